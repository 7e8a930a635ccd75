"""The quality of a codec of several rates, as its coded images store it: two bytes before the string of z."""

import struct

from modules.bitstream.file_format import BitstreamError

_FORM = struct.Struct("<H")
_PARTS = 1024
"""The quality is stored in steps of 1/1024."""


def storable(quality: float) -> float:
    """The nearest quality that can be stored."""
    return round(quality * _PARTS) / _PARTS


def with_quality(quality: float, z: bytes) -> bytes:
    """The string of z with the quality before it."""
    return _FORM.pack(round(quality * _PARTS)) + z


def split_quality(z: bytes, rates: int) -> tuple[float, bytes]:
    """The quality, from 1 to `rates`, and the string of z. Raises BitstreamError for damage."""
    quality = _FORM.unpack_from(z)[0] / _PARTS if len(z) >= _FORM.size else 0.0
    if not 1 <= quality <= rates:
        raise BitstreamError(f"damaged: quality {quality:.3f} of a codec with qualities from 1 to {rates}")
    return quality, z[_FORM.size :]
