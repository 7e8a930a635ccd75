"""`hpcm bench codec`: time and memory of coding a photograph, compared with its matrix products alone."""

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from modules import HPCM
from modules.bitstream.determinism import deterministic_float32
from pipeline.common.tables import Table
from pipeline.common.timing import timed
from pipeline.data.images import find_images, read_image

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
}
"""Operations counted as matrix products: convolutions (also depth-wise), linear layers and attention."""


@dataclass(frozen=True)
class Layout:
    """The properties of a tensor that the time of a matrix product depends on."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """The layout of a tensor; any other value is returned unchanged."""
        return cls(value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value

    def tensor(self) -> Tensor:
        """A tensor of random values with this layout."""
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return torch.rand(reach + 1, dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)


class Products(TorchDispatchMode):
    """Records the matrix products that run inside it, so that they can be run again alone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.calls: list[tuple[Callable[..., object], Any, Any]] = []
        self.tensors: dict[Layout, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, *tree_map(Layout.of, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        """Run the products with the codec's settings, on tensors of the same layouts, one tensor per layout."""
        with torch.no_grad(), deterministic_float32(self.device):
            for func, args, kwargs in self.calls:
                args, kwargs = tree_map(self._tensor, (args, kwargs))
                func(*args, **kwargs)

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, Layout):
            return value
        if value not in self.tensors:
            self.tensors[value] = value.tensor()
        return self.tensors[value]


@dataclass(frozen=True)
class Coded:
    """Encoding or decoding: median seconds, those of its products (None: not timed), and peak memory so far in GB."""

    direction: str
    memory: float
    seconds: float | None = None
    products: float | None = None


def bench_codec(model: HPCM, size: tuple[int, int] = (512, 768), rounds: int = 5) -> list[Coded]:
    """Encode and decode a packaged photograph, scaled to `size` (height, width); measures times and memory.

    In each round the encoder, its products, the decoder and its products take turns, so that other load on the machine
    slows all of them. Memory is the peak of the whole process, or what PyTorch reserved on a GPU. It is measured before
    the products run alone.
    """
    device = model.means_hyper.device
    image = _photograph(*size).to(device)
    with Products(device) as encoding:
        coded = model.compress(image)
    memory = [_peak_gb(device)]
    with Products(device) as decoding:
        model.decompress(**coded)
    memory.append(_peak_gb(device))

    contenders = {
        "encode": lambda: model.compress(image),
        "encode products": encoding.replay,
        "decode": lambda: model.decompress(**coded),
        "decode products": decoding.replay,
    }
    medians = _medians(contenders, rounds, device) if rounds else {}
    return [
        Coded(direction, peak, medians.get(direction), medians.get(f"{direction} products"))
        for direction, peak in zip(("encode", "decode"), memory, strict=True)
    ]


def _photograph(height: int, width: int) -> Tensor:
    pixels = torch.from_numpy(read_image(find_images(None, "val", 1).paths[0]))
    image = pixels.permute(2, 0, 1)[None] / 255
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _medians(contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each contender. The first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, contender in contenders.items():
            seconds[name].append(timed(contender, device))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def results_table(results: list[Coded], title: str) -> Table:
    """What `hpcm bench codec` prints."""
    table = Table(title, ("", "seconds", "products alone", "multiple", "peak memory"))
    for result in results:
        times = ["–"] * 3
        if result.seconds and result.products:
            times = [f"{result.seconds:.2f}", f"{result.products:.2f}", f"{result.seconds / result.products:.2f}"]
        table.add(result.direction, *times, f"{result.memory:.2f} GB")
    return table
