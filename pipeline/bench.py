"""`hpcm bench biwkv4`: the op against its reference, a dense form, a running-maximum scan and a plain copy."""

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modules import biwkv4 as op
from modules import biwkv4_build
from pipeline.timing import machine, timed

SIZES = ((1, 256, 640), (8, 256, 960), (1, 1536, 960), (1, 8160, 640), (1, 65536, 192))
GPU_SIZES = ((8, 4096, 960),)
DENSE_LIMIT = 1e9  # weights B·T·T·C beyond which the dense form would take minutes


@dataclass(frozen=True)
class Row:
    """Median times of one size (B, T, C), in seconds; None where a contender cannot run or would take minutes."""

    size: tuple[int, int, int]
    dtype: str
    copy: float
    forward: float
    both: float
    reference: float | None = None
    dense: float | None = None
    running: float | None = None
    running_both: float | None = None

    @property
    def per_element(self) -> float:
        """Seconds an element of k, forward and backward: constant where time is linear in T."""
        batch, length, channels = self.size
        return self.both / (batch * length * channels)


def bench_biwkv4(
    sizes: Sequence[tuple[int, int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 2.0,
    console: Console | None = None,
) -> list[Row]:
    """Measure each size for about so many seconds a contender, interleaved, and print the medians' ratios."""
    sizes = sizes or (SIZES if device == "cpu" else SIZES + GPU_SIZES)
    rows = [_measure(size, dtype, torch.device(device), seconds) for size in sizes]
    _print(rows, device, console or Console(width=120))
    return rows


def dense(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition as it stands, every weight computed. w, u (C,); k, v (B, T, C); returns (B, T, C)."""
    t = torch.arange(k.shape[1], device=k.device)
    gap = (t[:, None] - t).abs()[..., None]
    bias = torch.where(gap == 0, u, -(gap - 1) * w)
    return torch.cat([torch.einsum("tic,ic->tc", (bias + x).softmax(1), y)[None] for x, y in zip(k, v, strict=True)])


def _measure(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float) -> Row:
    batch, length, channels = size
    w = torch.linspace(-1, 8, channels, device=device) / length
    u = torch.randn(channels, device=device) / length
    k, v, grad_y = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    # The floor: k and v read, y written; a copy reads as much as it writes, so half of the three each.
    source = torch.randn(3 * k.numel() // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "forward": lambda: op.biwkv4(w, u, k, v),
        "both": lambda: torch.autograd.grad(op.biwkv4(*leaves), leaves, grad_y),
        "reference": lambda: op.biwkv4_reference(w, u, k, v),
    }
    if batch * length * length * channels <= DENSE_LIMIT:
        contenders["dense"] = lambda: dense(w, u, k, v)
    kernels = op._kernels(k)
    if kernels and kernels.running_maximum and dtype == torch.float32:
        contenders["running"] = lambda: _running_maximum(kernels, (w, u, k, v), None)
        contenders["running_both"] = lambda: (
            _running_maximum(kernels, (w, u, k, v), None),
            _running_maximum(kernels, (w, u, k, v), grad_y),
        )
    return Row(size, str(dtype).removeprefix("torch."), **_interleave(contenders, device, seconds))


def _running_maximum(kernels: biwkv4_build.Kernels, inputs: Sequence[Tensor], grad_y: Tensor | None) -> list[Tensor]:
    """The public kernels' algorithm on the same tensors, allocations and threads included, as the op has them."""
    assert kernels.running_maximum is not None
    call = op._describe(*inputs)
    call.runner = kernels.runner
    if grad_y is None:
        results = [torch.empty_like(inputs[2])]
        call.y = results[0].data_ptr()
    else:
        results = [torch.empty_like(x) for x in inputs]
        call.grad_y, call.grad_y_batch, call.grad_y_time = (
            grad_y.data_ptr(),
            grad_y.stride(0),
            grad_y.stride(1),
        )
        call.grad_w, call.grad_u, call.grad_k, call.grad_v = (x.data_ptr() for x in results)
    kernels.running_maximum(ctypes.byref(call), int(grad_y is not None))
    return results


def _interleave(contenders: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median time of each contender; they take turns: what else the machine does meets all of them."""
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
    for heading in ("B, T, C", "copy", "GB/s", "forward", "× copy", "fwd + bwd", "× copy", "ns/element"):
        table.add_column(heading, justify="right")
    for heading in ("reference", "dense", "running max", "both"):
        table.add_column(f"{heading} ×", justify="right")
    for row in rows:
        batch, length, channels = row.size
        moved = 3 * batch * length * channels * getattr(torch, row.dtype).itemsize
        table.add_row(
            f"{batch}, {length}, {channels}",
            f"{row.copy * 1e6:.0f} µs",
            f"{moved / row.copy * 1e-9:.1f}",
            f"{row.forward * 1e6:.0f} µs",
            f"{row.forward / row.copy:.2f}",
            f"{row.both * 1e6:.0f} µs",
            f"{row.both / row.copy:.2f}",
            f"{row.per_element * 1e9:.2f}",
            *(f"{x / row.forward:.1f}" if x else "–" for x in (row.reference, row.dense, row.running)),
            f"{row.running_both / row.both:.1f}" if row.running_both else "–",
        )
    console.print(table)
    console.print("Last four columns: that contender's time over the op's, forward (both: forward + backward).")


if __name__ == "__main__":
    bench_biwkv4()
