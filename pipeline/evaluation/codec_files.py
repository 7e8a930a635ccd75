"""Converts image files to `.hpcm` files and back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from modules import HPCM
from modules.bitstream.file_format import EPSILON, CodedImage
from modules.image_codec import ImageCodec
from modules.target_codec import TargetCodec
from pipeline.common.files import replacing
from pipeline.data.crops import to_tensor
from pipeline.data.pictures import FORMATS, DataError, Picture, read_picture
from pipeline.evaluation.conversions import Conversion
from pipeline.evaluation.limits import check_size
from pipeline.evaluation.metrics import psnr_db

SAVING: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 4},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "BMP": {},
    "TIFF": {},
    "PPM": {},
}
"""Formats to write, with Pillow options for lossless or near-lossless pictures; its defaults favor small files.

On six decoded photographs, level 4 of PNG took 40 % of the time of the default, 6, for files 1.8 % larger.
"""


@dataclass(frozen=True)
class Compressed:
    """The result for one picture: file size in bytes, PSNR in dB, times in seconds, and changes made when reading.

    PSNR and decoding time are None if the file was not decoded again.
    """

    width: int
    height: int
    file_bytes: int
    psnr_db: float | None
    encode_seconds: float
    decode_seconds: float | None
    changes: tuple[str, ...]

    @property
    def bpp(self) -> float:
        """Bits per pixel of the whole file."""
        return 8 * self.file_bytes / (self.width * self.height)


def read_to_code(path: Path, max_pixels: int | None, *models: HPCM, refined: bool = False) -> tuple[Picture, Tensor]:
    """Read a picture to code with these models. Returns it with its tensor (1, 3, H, W) in [0, 1].

    Raises DataError for a picture that cannot be read or is too large for one of the models, or for its refinement.
    """
    picture = read_picture(path, max_pixels)
    height, width, _ = picture.pixels.shape
    for model in models:
        check_size(model, height, width, max_pixels, refined)
    return picture, to_tensor(picture.pixels)[None]


def compress_file(
    codec: ImageCodec | TargetCodec,
    conversion: Conversion,
    epsilon: float = EPSILON,
    verify: bool = True,
    max_pixels: int | None = None,
) -> Compressed:
    """Compress a picture to an `.hpcm` file. With `verify`, its bytes are decoded before the file is written.

    Raises DataError for a picture that cannot be read or is too large, BitstreamError for one that cannot be coded,
    TargetError for one that cannot be coded to its target, and FileError.
    """
    picture, image = read_to_code(conversion.source, max_pixels, codec.model, refined=codec.effort > 0)
    start = time.perf_counter()
    data = codec.encode(image, picture.icc_profile, epsilon).pack()
    seconds, quality, decode_seconds = time.perf_counter() - start, None, None
    if verify:
        start = time.perf_counter()
        x_hat = codec.decode(CodedImage.parse(data)).x_hat
        decode_seconds = time.perf_counter() - start
        quality = psnr_db(image, to_8_bits(x_hat) / 255)
    with replacing(conversion.target) as partial:
        partial.write_bytes(data)
    height, width = image.shape[2:]
    return Compressed(width, height, len(data), quality, seconds, decode_seconds, picture.changes)


@dataclass(frozen=True)
class Decompressed:
    """The result for one file: the picture's size in pixels, and the recovery that decoding needed, or ""."""

    width: int
    height: int
    recovery: str


def decompress_file(
    codec_of: Callable[[bytes], ImageCodec], conversion: Conversion, max_pixels: int | None = None
) -> Decompressed:
    """Decode an `.hpcm` file, with its ICC profile, to a picture in the format of the target's suffix.

    `codec_of` returns the codec for the identity in a file. Raises BitstreamError for a file that is damaged or of
    another model, DataError for an unknown suffix or an image that is too large, and FileError.
    """
    form = FORMATS.get(conversion.target.suffix.lower())
    if form is None or form not in SAVING:
        suffixes = " ".join(suffix for suffix, known in FORMATS.items() if known in SAVING)
        raise DataError(f"{conversion.target}: unknown format; give a name that ends in one of {suffixes}")
    coded = CodedImage.read(conversion.source)
    codec = codec_of(coded.identity)
    check_size(codec.model, coded.height, coded.width, max_pixels)
    x_hat, recovery = codec.decode(coded)
    pixels = to_8_bits(x_hat)[0].byte().permute(1, 2, 0).cpu().numpy()
    with replacing(conversion.target) as partial:
        picture = Image.fromarray(pixels)
        picture.save(partial, format=form, icc_profile=coded.icc_profile or None, **SAVING[form])
    return Decompressed(coded.width, coded.height, recovery)


def to_8_bits(x_hat: Tensor) -> Tensor:
    """A reconstruction in [0, 1], rounded to integers in 0 … 255, of the same shape and dtype."""
    return (x_hat * 255).round()
