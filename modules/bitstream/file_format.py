"""The file that holds one coded image, `photo.hpcm`.

All numbers are little-endian; those without a type are unsigned.

| at | bytes | what |
|---|---|---|
| 0 | 4 | `HPCM` |
| 4 | 1 | version of this format: 2 |
| 5 | 1 | color: 0 = RGB, 8 bits per channel, in the color space of the ICC profile (sRGB without one) |
| 6 | 8 | identity of the model: the start of a SHA-256 of everything that a decoder computes with (`model_identity`) |
| 14 | 4 + 4 | height and width in pixels, of the upright image |
| 22 | 4 + 4 + 4 | lengths of the ICC profile, of z and of y |
| 34 | 4 | CRC-32 of bytes 0 … 33 |
| 38 | | ICC profile, z, y |
| end | 4 | CRC-32 of the profile, z and y |

z consists of the CRC-32 of its symbols and tables, followed by the range-coded bytes (`rans.py`). y consists of:

| at | bytes | what |
|---|---|---|
| 0 | 1 | 0 |
| 1 | 4 | ε, float32: 0, or 1e-6 to 5e-3 |
| 5 | 4 | g, the length of the guards |
| 9 | 10 × 2 | for each step but the last: lower half of the CRC-32 of y's symbols and tables (int32) up to this step |
| 29 | 4 | for the last step: the whole CRC-32 |
| 33 | g | guards; none (g = 0) if no boundary is moved |
| 33 + g | | the range-coded bytes of all eleven steps |

The guards have one entry for each of the eleven coding steps. An entry is a byte k, then one signed byte d for each
run of 2^k symbols, in the order of coding. A step in which no boundary is moved has the single byte 255. The scale of
each symbol of y is multiplied by exp(−5·ε·d) with the d of the symbol's run. The symbol is coded with the table whose
scale is nearest to this product, by ratio (`guards.py`). The official implementation takes the next larger table,
which gives longer files. The encoder chooses d so that no scale is within a relative 2ε of the moved boundary between
two tables.

If the scales of the encoder and of the decoder are each within ε of the exact ones, the decoder reads the encoder's
symbols. Processor, device, number of threads and version of PyTorch do not matter. The decoder's picture may differ
from the encoder's by rounding: few values differ, and by 1 of 255. If the scales differ by more, a check shows the
first step with wrong symbols. The decoder then decodes the whole image again in float64. If that fails as well, it
refuses the file. It never returns noise. `modules/PORTABILITY.md` has the measurements.
"""

import io
import os
import stat
import struct
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple


class BitstreamError(ValueError):
    """The bytes are not an image of this codec, or the codec cannot code the image. The message says which."""


MAGIC = b"HPCM"
VERSION = 2
RGB = 0
MAX_PIXELS = 2**26
"""Most pixels of an image, with padding, that are written or read. The limit bounds the memory for a forged size."""
MOST_BYTES = 64
"""Most bytes of z and y together for each padded pixel."""
MAX_PROFILE = 2**24
"""Most bytes of an ICC profile."""

_GRID = 128
"""Each codec pads height and width to multiples of this number, or of a multiple of it."""

EPSILON = 2e-5
"""Default ε: the relative error of the scales that is allowed to the encoder and to the decoder, each."""
LEAST_EPSILON, MOST_EPSILON = 1e-6, 5e-3
"""Below this range, the rounding of a boundary to float32 would matter. Above it, an offset would move a boundary by
more than a quarter of the distance between two boundaries."""

_ALLOWED = f"it must be 0 or {LEAST_EPSILON:g} to {MOST_EPSILON:g}"

GUARDS_HEAD = struct.Struct("<BfI10HI")
"""The start of y: 0, ε, the length of the guards, eleven checks."""

_HEADER = struct.Struct("<4sBB8sIIIII")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size


def check_epsilon(epsilon: float) -> float:
    """ε rounded to float32, as the file stores it; 0 means no guards. Raises ValueError if it is out of range."""
    if not _is_epsilon(epsilon):
        raise ValueError(f"ε = {epsilon}: {_ALLOWED}")
    (rounded,) = struct.unpack("<f", struct.pack("<f", epsilon))
    return float(rounded)


def _is_epsilon(epsilon: float) -> bool:
    # A value at a limit may exceed it slightly after the rounding to float32.
    return epsilon == 0 or 0.999 * LEAST_EPSILON <= epsilon <= 1.001 * MOST_EPSILON


class LatentHeader(NamedTuple):
    """ε and the size of the guards in a coded latent. They can be read without the model."""

    epsilon: float
    guard_bytes: int

    @classmethod
    def of(cls, string: bytes) -> "LatentHeader":
        """Read the start of a coded latent. Raises BitstreamError if the bytes cannot be one."""
        if len(string) < GUARDS_HEAD.size or string[0] != 0:
            raise BitstreamError(
                f"damaged: the coded latent has {len(string)} bytes, and does not start with a head of "
                f"{GUARDS_HEAD.size} bytes"
            )
        _, epsilon, length, *_ = GUARDS_HEAD.unpack_from(string)
        if not _is_epsilon(epsilon):
            raise BitstreamError(f"damaged: ε = {epsilon}: {_ALLOWED}")
        if GUARDS_HEAD.size + length > len(string):
            raise BitstreamError(
                f"damaged: the coded latent should have {length} bytes of table offsets, but has {len(string)} in all"
            )
        return cls(epsilon, length)


@dataclass(frozen=True)
class Header:
    """The header of a file. `identity` is the identity of the model."""

    identity: bytes
    height: int
    width: int
    icc_length: int
    z_length: int
    y_length: int

    def pack(self) -> bytes:
        """The header's bytes, checksum included."""
        fields = _HEADER.pack(MAGIC, VERSION, RGB, *astuple(self))
        return fields + _CHECK.pack(zlib.crc32(fields))

    @classmethod
    def parse(cls, data: bytes) -> "Header":
        """Read the first `HEADER_BYTES` of a file. Raises BitstreamError, which says what is wrong."""
        if data[:4] != MAGIC[: len(data)]:
            raise BitstreamError("not an HPCM file: it does not begin with HPCM")
        if len(data) > 4 and data[4] != VERSION:
            raise BitstreamError(f"format version {data[4]}; this program reads version {VERSION}")
        if len(data) < HEADER_BYTES:
            raise BitstreamError(f"truncated: {len(data)} bytes; the header alone has {HEADER_BYTES}")
        fields = data[: _HEADER.size]
        if _CHECK.unpack(data[_HEADER.size : HEADER_BYTES]) != (zlib.crc32(fields),):
            raise BitstreamError("damaged: the header does not match its checksum")
        _, _, color, *values = _HEADER.unpack(fields)
        header = cls(*values)
        if color != RGB:
            raise BitstreamError(f"color format {color}; this program reads {RGB} (RGB, 8 bits a channel)")
        most = MOST_BYTES * check_dimensions(header.height, header.width)
        if header.z_length + header.y_length > most or header.icc_length > MAX_PROFILE:
            raise BitstreamError(  # No codec writes this, and reading so many bytes could fill the memory.
                f"{header.file_bytes} bytes: far more than {header.width}×{header.height} pixels can have"
            )
        return header

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return HEADER_BYTES + self.icc_length + self.z_length + self.y_length + _CHECK.size


@dataclass(frozen=True)
class CodedImage:
    """The contents of a file: identity of the model, size in pixels, strings of z and y, ICC profile or b""."""

    identity: bytes
    height: int
    width: int
    z: bytes
    y: bytes
    icc_profile: bytes = b""

    @property
    def guards(self) -> LatentHeader:
        """ε and the size of the guards. Raises BitstreamError if they are damaged."""
        return LatentHeader.of(self.y)

    def pack(self) -> bytes:
        """The file's bytes. Raises BitstreamError if the ICC profile is too long for a reader."""
        if len(self.icc_profile) > MAX_PROFILE:
            raise BitstreamError(f"an ICC profile of {len(self.icc_profile):,} bytes; at most {MAX_PROFILE:,} are kept")
        lengths = len(self.icc_profile), len(self.z), len(self.y)
        body = self.icc_profile + self.z + self.y
        header = Header(self.identity, self.height, self.width, *lengths)
        return header.pack() + body + _CHECK.pack(zlib.crc32(body))

    @classmethod
    def parse(cls, data: bytes) -> "CodedImage":
        """Read a file's bytes without decoding the image. Raises BitstreamError, which says what is wrong."""
        return cls._read(io.BytesIO(data), len(data))

    @classmethod
    def read(cls, path: Path) -> "CodedImage":
        """Read a file. If its length differs from the one in the header, only the header is read."""
        if not stat.S_ISREG(path.stat().st_mode):
            raise BitstreamError("not a regular file")
        with path.open("rb") as file:
            return cls._read(file, os.fstat(file.fileno()).st_size)

    @classmethod
    def _read(cls, file: BinaryIO, size: int) -> "CodedImage":
        header = Header.parse(file.read(HEADER_BYTES))
        if size < header.file_bytes:
            raise BitstreamError(f"truncated: {size} of {header.file_bytes} bytes")
        if size > header.file_bytes:
            raise BitstreamError(f"extended: {size - header.file_bytes} bytes follow the image")
        parts = [file.read(length) for length in (header.icc_length, header.z_length, header.y_length)]
        if file.read() != _CHECK.pack(zlib.crc32(b"".join(parts))):
            raise BitstreamError("damaged: the coded image does not match its checksum")
        icc_profile, z, y = parts
        return cls(header.identity, header.height, header.width, z, y, icc_profile)


def check_dimensions(height: int, width: int) -> int:
    """The number of pixels with padding. Raises BitstreamError for no pixels, or for more than a file can hold."""
    padded = -(-height // _GRID) * -(-width // _GRID) * _GRID**2
    if not 1 <= padded <= MAX_PIXELS:
        raise BitstreamError(f"{width}×{height} pixels: images have 1 to {MAX_PIXELS} pixels, padding included")
    return padded
