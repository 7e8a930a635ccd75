"""The bundled codecs: one of the default kind for each quality, and others to try."""

from pathlib import Path

import yaml

from modules.bitstream.file_format import BitstreamError
from modules.image_codec import ImageCodec
from pipeline.common.errors import UserError
from pipeline.common.packaged import WEIGHTS
from pipeline.weights.checkpoints import load_codec, read_metadata

STAGE = "control"
"""The stage whose weights `hpcm compress` uses; each λ is a quality."""


def qualities(folder: Path = WEIGHTS) -> list[tuple[float, Path]]:
    """λ and weights file of each quality, in order of increasing λ; quality 1 gives the smallest coded images."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        metadata = read_metadata(path)
        if metadata.get("name") == STAGE:
            found.append((float(yaml.safe_load(metadata["stage"])["lmbda"]), path))
    return sorted(found)


def of_quality(quality: int | None, folder: Path = WEIGHTS) -> Path:
    """The weights file of a quality, 1 … N; None means the middle one. Raises UserError for any other number."""
    found = qualities(folder)
    number = (len(found) + 1) // 2 if quality is None else quality
    if not 1 <= number <= len(found):
        numbers = ", ".join(f"{at} (λ = {lmbda:g})" for at, (lmbda, _) in enumerate(found, start=1))
        raise UserError(f"--quality {number}: there are {numbers}; use --checkpoint for other weights")
    return found[number - 1][1]


class ShippedCodecs:
    """Finds the bundled codec that coded a file; each codec is loaded once."""

    def __init__(self, device: str = "cpu", folder: Path = WEIGHTS):
        self.device = device
        self.waiting = sorted(folder.glob("*.safetensors"), key=lambda path: (STAGE not in path.name, path))
        self.loaded: dict[bytes, ImageCodec] = {}

    def of(self, identity: bytes) -> ImageCodec:
        """The codec with this identity; raises BitstreamError if no bundled codec has it."""
        while identity not in self.loaded and self.waiting:
            codec = ImageCodec(load_codec(self.waiting.pop(0)).to(self.device))
            self.loaded[codec.identity] = codec
        if identity not in self.loaded:
            raise BitstreamError(
                f"made by another model: {identity.hex()} is none of the bundled ones; give its checkpoint with -c"
            )
        return self.loaded[identity]
