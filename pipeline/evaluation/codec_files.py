"""Image files to `.hpcm` files and back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modules.bitstream import CodedImage, ImageCodec
from modules.guards import EPSILON
from pipeline.common.files import replacing
from pipeline.data.images import SUFFIXES, DataError, Picture, files_below, read_picture
from pipeline.evaluation.limits import check_size
from pipeline.evaluation.metrics import psnr_db

SUFFIX = ".hpcm"
COMPRESSION = (SUFFIXES, SUFFIX)
DECOMPRESSION = ((SUFFIX,), ".png")
"""Suffixes to read, and the one to write."""
SAVING: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
"""What keeps a decoded picture as it is, or as near as the format can: Pillow's defaults are for small files."""


@dataclass(frozen=True)
class Conversion:
    """A file to read and the file to write; `name` is the latter's in the folder that is written to."""

    source: Path
    target: Path
    name: str


@dataclass(frozen=True)
class Compressed:
    """What became of one picture: size of the file in bytes, PSNR in dB, times in seconds, changes at reading.

    PSNR and the time of decoding are None where the file was not decoded again.
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


def find(sources: Sequence[Path], suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files named, and those of these suffixes in and below the folders named, each with its relative name.

    Raises DataError for a source that does not exist, and where a folder has none of them.
    """
    found = []
    for source in sources:
        if source.is_dir():
            below = sorted(files_below(source, suffixes))
            if not below:
                raise DataError(f"{source}: no {' '.join(suffixes)} here or below")
            found += below
        elif source.is_file():
            found.append((source.name, source))
        else:
            what = "not a regular file" if source.exists() else "no such file or folder"
            raise DataError(f"{source}: {what}")
    return found


def plan(
    sources: Sequence[Path], output: Path | None, suffixes: tuple[tuple[str, ...], str], overwrite: bool
) -> list[Conversion]:
    """What to write for `sources`: beside each file, in the folder `output` (which is made), or to the file `output`.

    `suffixes` is `COMPRESSION` or `DECOMPRESSION`. `output` is a file where one file is given and `output` has a
    suffix. Raises DataError for an `output` that cannot be meant, where two conversions would write one file and,
    unless `overwrite`, where a file to be written exists.
    """
    read, written = suffixes
    found = find(sources, read)
    if output and output.suffix and not output.is_dir() and len(sources) == 1 and not sources[0].is_dir():
        if written == SUFFIX != output.suffix.lower():
            raise DataError(f"{output}: a coded image is named *{SUFFIX}; an existing folder may have any name")
        conversions = [Conversion(found[0][1], output, output.name)]
    elif output and output.suffix.lower() == written and not output.is_dir():
        raise DataError(f"{output}: this names one file, for {len(found)}; give a folder")
    else:
        conversions = [_beside(path, Path(name).with_suffix(written), output) for name, path in found]
    writers: dict[Path, Path] = {}
    for conversion in conversions:
        target = conversion.target
        if target in writers:
            raise DataError(f"{target}: both {writers[target]} and {conversion.source} would be written there")
        if target.exists() and not overwrite:
            raise DataError(f"{target}: exists; --overwrite replaces it")
        writers[target] = conversion.source
    for folder in {target.parent for target in writers}:
        folder.mkdir(parents=True, exist_ok=True)  # Before the work: it may not be allowed.
    return conversions


def _beside(source: Path, name: Path, folder: Path | None) -> Conversion:
    return Conversion(source, folder / name if folder else source.with_name(name.name), name.as_posix())


def compress_file(
    codec: ImageCodec,
    conversion: Conversion,
    epsilon: float = EPSILON,
    verify: bool = True,
    max_pixels: int | None = None,
) -> Compressed:
    """Write a picture as an `.hpcm` file, with `verify` once its bytes have been decoded again.

    Raises DataError for a picture that cannot be read or is too large, BitstreamError for one that cannot be coded,
    FileError.
    """
    picture = read_picture(conversion.source, max_pixels)
    image = to_tensor(picture)
    check_size(codec.model, image.shape[2], image.shape[3], max_pixels)
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
    """What became of one file: the picture's size in pixels, and what recovery it needed, or ""."""

    width: int
    height: int
    recovery: str


def decompress_file(
    codec_of: Callable[[bytes], ImageCodec], conversion: Conversion, max_pixels: int | None = None
) -> Decompressed:
    """Decode an `.hpcm` file to a picture in the format of the target's suffix, with the ICC profile it came with.

    `codec_of` gives the codec of the model that a file names. Raises BitstreamError for a file that is damaged or
    another model's, DataError for an unknown suffix and an image that is too large, FileError.
    """
    form = Image.registered_extensions().get(conversion.target.suffix.lower())
    if form is None or conversion.target.suffix.lower() not in SUFFIXES:
        raise DataError(f"{conversion.target}: pictures are written as {' '.join(SUFFIXES)}")
    coded = CodedImage.read(conversion.source)
    codec = codec_of(coded.identity)
    check_size(codec.model, coded.height, coded.width, max_pixels)
    x_hat, recovery = codec.decode(coded)
    pixels = to_8_bits(x_hat)[0].byte().permute(1, 2, 0).cpu().numpy()
    with replacing(conversion.target) as partial:
        picture = Image.fromarray(pixels)
        picture.save(partial, format=form, icc_profile=coded.icc_profile or None, **SAVING.get(form, {}))
    return Decompressed(coded.width, coded.height, recovery)


def to_tensor(picture: Picture) -> Tensor:
    """Pixels as float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(picture.pixels.transpose(2, 0, 1).astype(np.float32)[None] / 255)


def to_8_bits(x_hat: Tensor) -> Tensor:
    """A reconstruction in [0, 1] as whole numbers from 0 to 255, of the same shape and type."""
    return (x_hat * 255).round()
