"""Writes the streams of `hpcm verify` again, with every bundled codec: `make conformance`."""

from dataclasses import asdict

import torch
from skimage.data import chelsea, coffee
from torch import Tensor

from modules.bitstream.coding import in_float64
from modules.bitstream.file_format import EPSILON
from modules.image_codec import ImageCodec
from pipeline.common.files import write_json
from pipeline.common.packaged import WEIGHTS
from pipeline.evaluation.conformance import REFERENCE, STREAMS, Reference, symbols_digest, tables_digest
from pipeline.evaluation.conversions import SUFFIX
from pipeline.weights.checkpoints import load_codec


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
    """Code each image by every model, write the streams and the reference from float64, and print their total size."""
    references = {}
    for model in sorted(WEIGHTS.glob("*.safetensors")):
        codec = ImageCodec(load_codec(model))
        exact = in_float64(codec.model)
        for image_name, (image, epsilon) in images().items():
            coded = codec.encode(image, epsilon=epsilon)
            name = f"{model.stem}-{image_name}{SUFFIX}"
            (STREAMS / name).write_bytes(coded.pack())
            symbols = exact.trace(coded.y, coded.z, (coded.height, coded.width)).symbols
            references[name] = asdict(Reference(model.name, tables_digest(codec.model), symbols_digest(symbols)))
    write_json(STREAMS / REFERENCE, references)
    print(f"{STREAMS}: {sum(path.stat().st_size for path in STREAMS.iterdir())} bytes")


if __name__ == "__main__":
    main()
