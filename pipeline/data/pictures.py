"""Decodes one image file. The file may come from anyone."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.common.errors import UserError
from pipeline.common.files import check_regular
from pipeline.common.memory import too_large

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# Pillow detects the format by content, and some formats start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")

PIXEL_BYTES = 16
"""Most bytes per pixel that decoding takes: two copies of four channels of 16 bits."""
LARGEST_EXTRA = 2**28
"""Most bytes of a file besides its pixels: profiles, previews, further pages."""


class DataError(UserError):
    """Images cannot be used; the message names the file or folder and says what to do."""


def file_status(path: Path) -> os.stat_result:
    """The status of a file that is regular and not empty; raises DataError for any other."""
    status = check_regular(path, DataError)
    if status.st_size == 0:
        raise DataError(f"{path}: empty file")
    return status


@contextmanager
def opened(path: Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """An open image, not decoded yet; raises DataError for one that is damaged or too large, also while it is read."""
    size, limit = file_status(path).st_size, Image.MAX_IMAGE_PIXELS
    most = max(limit or 0, max_pixels or 0)
    if size > LARGEST_EXTRA + PIXEL_BYTES * most:  # Pillow reads a whole WebP file to open it.
        raise DataError(f"{path}: {size:,} bytes, far more than an image of {most:,} pixels can have")
    try:
        if max_pixels is not None and limit is not None:
            Image.MAX_IMAGE_PIXELS = most
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                _check_size(path, picture, size, max_pixels)
                yield picture
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: damaged, or not an image ({' '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    # On damaged files, Pillow's plugins raise many classes: OSError, SyntaxError, struct.error, KeyError …
    except Exception as problem:
        raise DataError(f"{path}: cannot be read: {problem or type(problem).__name__}") from problem
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, picture: Image.Image, size: int, max_pixels: int | None) -> None:
    """Raise DataError for an image too large to decode, and for a file far larger than its pixels."""
    pixels = picture.width * picture.height
    if max_pixels is not None:
        if pixels > max_pixels:
            raise DataError(f"{path}: {picture.width}×{picture.height}, more than --max-pixels {max_pixels}")
    elif reason := too_large(PIXEL_BYTES * pixels):
        raise DataError(f"{path}: {picture.width}×{picture.height} pixels: {reason}; --max-pixels allows it")
    if size > LARGEST_EXTRA + PIXEL_BYTES * pixels:
        raise DataError(f"{path}: {size:,} bytes, far more than {picture.width}×{picture.height} pixels can have")


@dataclass(frozen=True)
class Picture:
    """Pixels (H, W, 3), uint8 RGB, rotated by EXIF orientation, and their ICC profile or b''.

    Each of `changes` describes in a few words what reading changed or dropped.
    """

    pixels: np.ndarray
    icc_profile: bytes
    changes: tuple[str, ...]


def read_image(path: Path) -> np.ndarray:
    """Decode an image into uint8 RGB, (H, W, 3), as `read_picture` does."""
    return read_picture(path).pixels


def read_picture(path: Path, max_pixels: int | None = None) -> Picture:
    """Decode an image of at most `max_pixels` and apply its EXIF orientation; for None, memory sets the limit.

    Channels of 16 bits become 8 bits. Transparency is blended with white. Gray, palette and CMYK become RGB; a color
    profile that is not for RGB is dropped. Only the first page or frame is read. Raises DataError naming the file.
    """
    with opened(path, max_pixels) as picture:
        changes = ["16 bits a channel became 8"] if _is_deep(picture) else []
        if getattr(picture, "is_animated", False):  # `n_frames` would read every page of a TIFF to count them.
            changes.append("only the first frame was kept")
        icc_profile = picture.info.get("icc_profile", b"")
        if icc_profile and icc_profile[16:20] != b"RGB ":
            changes.append(f"the color profile of the {picture.mode} image was dropped because it is not for RGB")
            icc_profile = b""
        upright = ImageOps.exif_transpose(picture)
        if upright.mode[0] in "IF":
            return Picture(_from_deep_gray(np.asarray(upright)), icc_profile, tuple(changes))
        if upright.has_transparency_data:
            changes.append("transparency was blended with white")
            opaque = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(opaque, upright.convert("RGBA"))
        return Picture(np.array(upright.convert("RGB")), icc_profile, tuple(changes))


def _is_deep(picture: Image.Image) -> bool:
    """Whether a channel has more than 8 bits; for RGB, only the decoder's settings show it."""
    settings = [(tile.codec_name, tile.args) for tile in getattr(picture, "tile", [])]
    return picture.mode[0] in "IF" or any(
        args[1] > 255 if codec == "ppm" else ";16" in str(args) for codec, args in settings
    )


def _from_deep_gray(gray: np.ndarray) -> np.ndarray:
    if gray.dtype.kind == "f" or gray.min() < 0 or gray.max() > 65535:
        raise ValueError("gray values beyond 16 bits; save the image with 8 or 16 bits")
    eight = np.round(gray / 257).astype(np.uint8)
    return np.repeat(eight[:, :, None], 3, axis=2)
