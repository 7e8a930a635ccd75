"""Writes the streams of `hpcm verify` again, with every bundled codec: `make conformance`."""

import torch
from skimage.data import chelsea, coffee
from torch import Tensor

from modules.bitstream.file_format import EPSILON
from pipeline.evaluation.conformance import STREAMS, write_suite
from pipeline.weights.shipped import WEIGHTS


def images() -> dict[str, tuple[Tensor, float]]:
    """Each image (1, 3, H, W) with its ε: an odd size, one pixel, residuals beyond the tables, many guards."""
    cat, cup = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 for pixels in (chelsea(), coffee()))
    noise = 3 * torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0)).round()  # where white is 1
    return {
        "odd": (cat[:, :, 60:257, 80:261], EPSILON),
        "pixel": (cup[:, :, :1, :1], EPSILON),
        "noise": (noise, 1e-3),  # so far out of range, softmax makes float32's rounding a hundred times larger
        "guards": (cup[:, :, 100:228, 150:278], 1e-3),
    }


def main() -> None:
    """Write the files and print their total size."""
    write_suite(images(), sorted(WEIGHTS.glob("*.safetensors")))
    print(f"{STREAMS}: {sum(path.stat().st_size for path in STREAMS.iterdir())} bytes")


if __name__ == "__main__":
    main()
