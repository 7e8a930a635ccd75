"""Decodes image files into 8-bit RGB, and refuses files that are damaged or too large."""

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

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".gif": "GIF",
}
"""Suffixes of images, in lower case, and Pillow's names of their formats.

Others are not read: Pillow detects a format by content, and some start other programs (EPS runs Ghostscript).
"""
SUFFIXES = tuple(FORMATS)
SUPPORTED = tuple(dict.fromkeys(FORMATS.values()))

PIXEL_BYTES = 16
"""Maximum memory in bytes that decoding takes per pixel: two copies of four channels of 16 bits."""
LARGEST_EXTRA = 2**28
"""Maximum size in bytes of what a file contains besides its pixels: profiles, previews, further pages."""

_ALLOWED = "; commands with --max-pixels can allow it"

# `opened` refuses these images itself, with the name of the file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DataError(UserError):
    """Images cannot be used. The message names the file or folder and says what to do."""


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
    profile that is not for RGB is dropped. Only the first page or frame is read. AVIF's 10 and 12 bits become 8 without
    a note in `changes`, because Pillow does not report them. Raises DataError naming the file.
    """
    with opened(path, max_pixels) as picture:
        changes = ["16 bits a channel became 8"] if _is_deep(picture) else []
        if getattr(picture, "is_animated", False):  # `n_frames` would read every page of a TIFF to count them.
            changes.append("only the first frame was kept")
        icc_profile = picture.info.get("icc_profile") or b""
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


@contextmanager
def opened(path: Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image of acceptable size without decoding it. Raises DataError naming the file, also for its decoding."""
    file_bytes, limit = check_regular(path, DataError).st_size, Image.MAX_IMAGE_PIXELS
    most = max(limit or 0, max_pixels or 0)
    if file_bytes == 0:
        raise DataError(f"{path}: empty file")
    if file_bytes > LARGEST_EXTRA + PIXEL_BYTES * most:  # Pillow reads a whole WebP or AVIF file to open it.
        raise DataError(f"{path}: {file_bytes:,} bytes, far more than an image of {most:,} pixels can have")
    try:
        if max_pixels is not None and limit is not None:
            Image.MAX_IMAGE_PIXELS = most
        with Image.open(path, formats=SUPPORTED) as picture:
            _check_size(path, picture, file_bytes, max_pixels)
            yield picture
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: damaged, or not an image of a supported format ({', '.join(SUPPORTED)})") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels{_ALLOWED}") from None
    # On damaged files, Pillow's plugins raise many classes: OSError, SyntaxError, struct.error, KeyError …
    except Exception as problem:
        raise DataError(f"{path}: cannot be read: {problem or type(problem).__name__}") from problem
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(path: Path, picture: Image.Image, file_bytes: int, max_pixels: int | None) -> None:
    """Raise DataError for an image too large to decode, and for a file far larger than its pixels."""
    pixels, size = picture.width * picture.height, f"{picture.width}×{picture.height}"
    if max_pixels is not None:
        if pixels > max_pixels:
            raise DataError(f"{path}: {size}, more than --max-pixels {max_pixels}")
    elif Image.MAX_IMAGE_PIXELS and pixels > Image.MAX_IMAGE_PIXELS:
        raise DataError(f"{path}: {size}, more than {Image.MAX_IMAGE_PIXELS} pixels{_ALLOWED}")
    elif reason := too_large(PIXEL_BYTES * pixels):
        raise DataError(f"{path}: {size} pixels: {reason}{_ALLOWED}")
    if file_bytes > LARGEST_EXTRA + PIXEL_BYTES * pixels:
        raise DataError(f"{path}: {file_bytes:,} bytes, far more than {size} pixels can have")


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
