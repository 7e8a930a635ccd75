"""Checks from an image's size, before any allocation, whether memory suffices to code it."""

from modules import HPCM, HPCMConfig
from pipeline.common.memory import too_large
from pipeline.data.pictures import DataError

GRID = 128
"""Smallest padding multiple of any codec, in pixels."""


def padded_pixels(height: int, width: int, multiple: int = GRID) -> int:
    """Number of pixels of an image after padding."""
    return -(-height // multiple) * -(-width // multiple) * multiple**2


def coding_bytes(config: HPCMConfig, pixels: int) -> int:
    """Upper estimate of the memory in bytes for encoding or decoding an image with `pixels` padded pixels.

    It counts three activations at half the image's size, ten at the latent's size, and the image twice, in float32.
    From four million pixels on, it exceeds the measured use (`base`: 200 to 280 bytes a pixel, `tiny`: 80 to 95).
    Smaller images need a few hundred MB more.
    """
    channels = 3 * config.widths[0] / 4 + 10 * config.M / 256 + 6
    return int(4 * channels * pixels)


def check_size(model: HPCM, height: int, width: int, max_pixels: int | None = None) -> None:
    """Raise DataError for an image that has more than `max_pixels` with padding; for None, memory sets the limit."""
    pixels = padded_pixels(height, width, model.downsampling_factor)
    size = f"{width}×{height} pixels, {pixels:,} with padding"
    if max_pixels is not None:
        if pixels > max_pixels:
            raise DataError(f"{size}: more than --max-pixels {max_pixels}")
    elif reason := too_large(coding_bytes(model.config, pixels)):
        raise DataError(f"{size}: coding {reason}; --max-pixels {pixels} allows it")
