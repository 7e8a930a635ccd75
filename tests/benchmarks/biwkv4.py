"""Speed of the Bi-WKV4 operator, its reference and its definition, of a copy that moves as many bytes, and of a launch.

python tests/benchmarks/biwkv4.py --device cuda --dtype bfloat16
"""

import argparse
import ctypes
import platform
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Compare, Timer

from modules.biwkv4.op import biwkv4, biwkv4_reference

SIZES = [(1, 256, 640), (8, 256, 960), (1, 1536, 960), (1, 8160, 640), (1, 65536, 192)]
"""Sizes of k: (B, T, C)."""
GPU_SIZES = [*SIZES, (16, 256, 640), (8, 4096, 960)]
MOST_DENSE = 1e9
"""Number of weights, B·T·T·C, above which the definition would take minutes."""


def dense(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator by its definition, with all T·T weights. w, u (C,); k, v (B, T, C); returns (B, T, C)."""
    t = torch.arange(k.shape[1], device=k.device)
    gap = (t[:, None] - t).abs()[..., None]
    bias = torch.where(gap == 0, u, -(gap - 1) * w)
    pairs = zip(k.float(), v.float(), strict=True)
    return torch.stack([torch.einsum("tic,ic->tc", (bias + x).softmax(1), y) for x, y in pairs]).to(k.dtype)


def contenders(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """What is timed for k and v of this size."""
    batch, length, channels = size
    w = torch.linspace(-1, 8, channels, device=device) / length
    u = torch.randn(channels, device=device) / length
    k, v, grad_y = (torch.randn(size, device=device).to(dtype) for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (w, u, k, v)]
    # The forward pass reads k and v and writes y. A copy of 3/2 of a tensor moves as many bytes.
    source = torch.randn(3 * k.numel() // 2, device=device).to(dtype)
    target = torch.empty_like(source)
    one = torch.empty(1, device=device)
    found: dict[str, Callable[[], object]] = {
        "launch": lambda: one.zero_(),
        "copy": lambda: target.copy_(source),
        "forward": lambda: biwkv4(w, u, k, v),
        "forward and backward": lambda: torch.autograd.grad(biwkv4(*leaves), leaves, grad_y),
        "reference": lambda: biwkv4_reference(w, u, k, v),
    }
    if batch * length * length * channels <= MOST_DENSE:
        found["definition"] = lambda: dense(w, u, k, v)
    return found


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory. Otherwise all contenders but the copy would wait for fresh pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Print a table of median times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    given = parser.parse_args()
    keep_freed_memory()
    found = []
    for size in SIZES if given.device == "cpu" else GPU_SIZES:
        for name, call in contenders(size, getattr(torch, given.dtype), given.device).items():
            about = {"label": f"Bi-WKV4, {given.dtype}, {given.device}", "sub_label": str(size), "description": name}
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads(), **about)
            found.append(timer.blocked_autorange(min_run_time=given.seconds))
    Compare(found).print()


if __name__ == "__main__":
    main()
