"""Images that a codec can code within the memory there is: known from their size, before anything is allocated."""

from modules import HPCM, HPCMConfig
from pipeline.common.memory import too_large
from pipeline.data.images import DataError

GRID = 128
"""Pixels that every codec pads height and width to a multiple of, at least."""


def padded_pixels(height: int, width: int, multiple: int = GRID) -> int:
    """Pixels of an image as a codec computes on it."""
    return -(-height // multiple) * -(-width // multiple) * multiple**2


def coding_bytes(config: HPCMConfig, pixels: int) -> int:
    """Memory in bytes that encoding and decoding take at most, for so many padded pixels.

    Three activations at half the image's size, ten at the latent's, and the image twice, in float32. From four million
    pixels on, this is more than what was measured (`base`: 200 to 280 bytes a pixel, `tiny`: 80 to 95); smaller images
    take a few hundred MB beside it.
    """
    channels = 3 * config.widths[0] / 4 + 10 * config.M / 256 + 6
    return int(4 * channels * pixels)


def check_size(model: HPCM, height: int, width: int, max_pixels: int | None = None) -> None:
    """Raise DataError for an image beyond `max_pixels`, padding included; of None, beyond what memory allows."""
    pixels = padded_pixels(height, width, model.downsampling_factor)
    size = f"{width}×{height} pixels, {pixels:,} with padding"
    if max_pixels is not None:
        if pixels > max_pixels:
            raise DataError(f"{size}: more than --max-pixels {max_pixels}")
    elif reason := too_large(coding_bytes(model.config, pixels)):
        raise DataError(f"{size}: coding {reason}; --max-pixels {pixels} allows it")
