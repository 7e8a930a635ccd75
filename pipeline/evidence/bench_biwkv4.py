"""`hpcm bench biwkv4`: speed of the operator against its reference, a dense form and a plain copy."""

import ctypes
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modules.biwkv4.op import biwkv4, biwkv4_reference
from pipeline.common.timing import machine, timed

SIZES = ((1, 256, 640), (8, 256, 960), (1, 1536, 960), (1, 8160, 640), (1, 65536, 192))
GPU_SIZES = ((8, 4096, 960),)
BACKWARD_FLOOR = 5 / 3  # k, v and grad_y read, grad_k and grad_v written; the copy moves three tensors
DENSE_LIMIT = 1e9  # number of weights, B·T·T·C, above which the dense form would take minutes


@dataclass(frozen=True)
class Row:
    """Median times of one size (B, T, C), in seconds; None for a contender that cannot run or would take minutes."""

    size: tuple[int, int, int]
    dtype: str
    copy: float
    forward: float
    both: float
    reference: float | None = None
    dense: float | None = None

    @property
    def per_element(self) -> float:
        """Seconds per element of k, forward and backward. It is constant if time is linear in T."""
        batch, length, channels = self.size
        return self.both / (batch * length * channels)


def bench_biwkv4(
    sizes: Sequence[tuple[int, int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 2.0,
    console: Console | None = None,
) -> list[Row]:
    """Measure each size for about `seconds` per contender, interleaved, and print ratios of medians."""
    _keep_freed_memory()
    sizes = sizes or (SIZES if device == "cpu" else SIZES + GPU_SIZES)
    rows = [_measure(size, dtype, torch.device(device), seconds) for size in sizes]
    _print(rows, device, console or Console(width=120))
    return rows


def dense(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator by its definition, with all T·T weights. w, u (C,); k, v (B, T, C); returns (B, T, C)."""
    t = torch.arange(k.shape[1], device=k.device)
    gap = (t[:, None] - t).abs()[..., None]
    bias = torch.where(gap == 0, u, -(gap - 1) * w)
    pairs = zip(k.float(), v.float(), strict=True)
    return torch.stack([torch.einsum("tic,ic->tc", (bias + x).softmax(1), y) for x, y in pairs]).to(k.dtype)


def _measure(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float) -> Row:
    batch, length, channels = size
    w = torch.linspace(-1, 8, channels, device=device) / length
    u = torch.randn(channels, device=device) / length
    k, v, grad_y = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    # The forward pass reads k and v and writes y. A copy of 3/2 of a tensor moves as many bytes.
    source = torch.randn(3 * k.numel() // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "forward": lambda: biwkv4(w, u, k, v),
        "both": lambda: torch.autograd.grad(biwkv4(*leaves), leaves, grad_y),
        "reference": lambda: biwkv4_reference(w, u, k, v),
    }
    if batch * length * length * channels <= DENSE_LIMIT:
        contenders["dense"] = lambda: dense(w, u, k, v)
    return Row(size, str(dtype).removeprefix("torch."), **_interleave(contenders, device, seconds))


def _keep_freed_memory() -> None:
    """Make glibc reuse freed memory. Otherwise all contenders but the copy would wait for fresh pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _interleave(contenders: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of each contender. They take turns, so that other load on the machine slows all of them."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    for contender in contenders.values():  # builds, allocations, caches
        timed(contender, device)
    while running := [name for name in contenders if spent[name] < seconds and len(samples[name]) < 200]:
        for name in running:
            samples[name].append(timed(contenders[name], device))
            spent[name] += samples[name][-1]
    return {name: statistics.median(times) for name, times in samples.items()}


def _print(rows: Sequence[Row], device: str, console: Console) -> None:
    table = Table(title=f"Bi-WKV4 in {rows[0].dtype} on {machine(device)}")
    for heading in ("B, T, C", "copy µs", "GB/s", "forward", "both", "of copy's GB/s", "ns/element"):
        table.add_column(heading, justify="right")
    for heading in ("reference", "dense"):
        table.add_column(heading, justify="right")
    for row in rows:
        batch, length, channels = row.size
        moved = 3 * batch * length * channels * getattr(torch, row.dtype).itemsize
        backward = row.both - row.forward
        table.add_row(
            f"{batch}, {length}, {channels}",
            f"{row.copy * 1e6:.0f}",
            f"{moved / row.copy * 1e-9:.1f}",
            f"{row.forward / row.copy:.2f}",
            f"{row.both / row.copy:.2f}",
            f"{row.copy / row.forward:.0%}, {BACKWARD_FLOOR * row.copy / backward:.0%}",
            f"{row.per_element * 1e9:.2f}",
            *(f"{x / row.forward:.1f}" if x else "–" for x in (row.reference, row.dense)),
        )
    console.print(table)
    console.print(
        "Forward, both (forward and backward): time divided by the copy's. Of copy's GB/s: forward, backward, "
        "each counted by the bytes that it must move. Reference, dense: forward time divided by the operator's."
    )
