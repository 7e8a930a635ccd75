"""Time and memory of coding a photograph, and the time of its matrix products alone.

python tests/benchmarks/codec.py --preset base --phase 4
"""

import argparse
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Compare, Timer

from modules import HPCM
from modules.bitstream.determinism import deterministic_float32
from pipeline.data.images import find_images
from pipeline.data.pictures import read_image

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

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., object], Any, Any]] = []
        self.tensors: dict[Layout, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.calls.append((func, *tree_map(Layout.of, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def replay(self, device: torch.device) -> None:
        """Run the products with the codec's settings, on tensors of the same layouts, one tensor per layout."""
        with torch.no_grad(), deterministic_float32(device):
            for func, args, kwargs in self.calls:
                args, kwargs = tree_map(self._tensor, (args, kwargs))
                func(*args, **kwargs)

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, Layout):
            return value
        if value not in self.tensors:
            self.tensors[value] = value.tensor()
        return self.tensors[value]


def photograph(height: int, width: int) -> Tensor:
    """A packaged photograph, scaled, (1, 3, H, W)."""
    pixels = torch.from_numpy(read_image(Path(find_images(None, "val", 1).paths[0])))
    image = pixels.permute(2, 0, 1)[None] / 255
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def main() -> None:
    """Print peak memory, and median times of encoding, decoding and their products."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="base", help="base, large, phi-context or tiny, untrained")
    parser.add_argument("--phase", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), help="height and width")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each measurement; 0: only memory")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    model = HPCM.from_preset(given.preset, given.phase).eval().to(device)
    model.update()
    image = photograph(*given.size).to(device)
    with Products() as encoding:
        coded = model.compress(image)
    with Products() as decoding:
        model.decompress(**coded)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory: {torch.cuda.max_memory_reserved() / 2**30 if device.type == 'cuda' else host:.2f} GiB")
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("encode", "all"): lambda: model.compress(image),
        ("encode", "products alone"): lambda: encoding.replay(device),
        ("decode", "all"): lambda: model.decompress(**coded),
        ("decode", "products alone"): lambda: decoding.replay(device),
    }
    found = []
    for (direction, what), call in calls.items() if given.seconds else ():
        about = {"label": f"{given.preset}, Phase {given.phase}", "sub_label": direction, "description": what}
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads(), **about)
        found.append(timer.blocked_autorange(min_run_time=given.seconds))
    if found:
        Compare(found).print()


if __name__ == "__main__":
    main()
