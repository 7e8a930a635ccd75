"""Time and memory of coding a photograph.

python tests/benchmarks/codec.py --preset base --phase 4
"""

import argparse
import resource
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Compare, Timer

from modules import HPCM
from pipeline.data.images import find_images
from pipeline.data.pictures import read_image


def photograph(height: int, width: int) -> Tensor:
    """A packaged photograph, scaled, (1, 3, H, W)."""
    pixels = torch.from_numpy(read_image(Path(find_images(None, "val", 1).paths[0])))
    image = pixels.permute(2, 0, 1)[None] / 255
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def main() -> None:
    """Print peak memory, and median times of encoding and decoding."""
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
    coded = model.compress(image)
    model.decompress(**coded)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory: {torch.cuda.max_memory_reserved() / 2**30 if device.type == 'cuda' else host:.2f} GiB")
    found = []
    calls = {"encode": lambda: model.compress(image), "decode": lambda: model.decompress(**coded)}
    for direction, call in calls.items() if given.seconds else ():
        about = {"label": f"{given.preset}, Phase {given.phase}", "description": direction}
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads(), **about)
        found.append(timer.blocked_autorange(min_run_time=given.seconds))
    if found:
        Compare(found).print()


if __name__ == "__main__":
    main()
