"""The file that holds one coded image, `photo.hpcm`: version 2 of the format.

All numbers are little-endian; those without a type are unsigned.

| at | bytes | what |
|---|---|---|
| 0 | 4 | `HPCM` |
| 4 | 1 | version of this format: 2 |
| 5 | 1 | color: 0 = RGB, 8 bits a channel, in the color space of the ICC profile (sRGB where there is none) |
| 6 | 8 | identity of the model: start of the SHA-256 of all that a decoder computes with (`model_identity`) |
| 14 | 4 + 4 | height and width in pixels, the right way up |
| 22 | 4 + 4 + 4 | lengths of the ICC profile, of z and of y |
| 34 | 4 | CRC-32 of bytes 0 … 33 |
| 38 | | ICC profile, z, y |
| end | 4 | CRC-32 of the profile, z and y |

z is the CRC-32 of its symbols and tables, then their range-coded bytes (`modules.rans`). y is

| at | bytes | what |
|---|---|---|
| 0 | 1 | 0, where version 1 has the number of threads |
| 1 | 4 | ε, float32: 0, or 1e-6 to 5e-3 |
| 5 | 4 | g, the length of the guards |
| 9 | 10 × 2 | after each step but the last, the lower half of the CRC-32 of y's symbols and tables so far (int32) |
| 29 | 4 | after the last step, the whole of it |
| 33 | g | guards; none where nothing is moved |
| 33 + g | | the range-coded bytes of all eleven steps |

The guards are, for each of the eleven coding steps, a byte k and one signed byte d for each run of 2^k symbols, in
the order of coding; 255 stands alone for a step where nothing is moved. A symbol of y is coded with the table whose
scale is nearest, by ratio, to its own scale times exp(−5·ε·d), d its run's (`modules.guards`); the official
implementation takes the next larger table, which is longer. The encoder chooses d so that no scale is within a
relative 2ε of the middle between two tables.

What is promised: a machine whose scales are within ε of the exact ones, as the encoder's are, reads the same symbols,
whatever its processor, device, thread count or PyTorch. Its picture differs from the encoder's by rounding: by 1 of
255 at few values. Elsewhere the step where the symbols part is noticed; the decoder computes again in float64, then
tries other tables next to a boundary (`modules.recovery`), and refuses where neither helps. It never decodes into
noise. `PORTABILITY.md` beside this file has what was measured.

Version 1 promised the machine and build that encoded, and no other. Its y is the number of threads (1 byte), the
CRC-32 of symbols and tables, and the range-coded bytes; no scale is multiplied. `modules.version1` still reads it.
"""

import io
import os
import stat
import struct
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from modules import version1
from modules.codec import HPCM
from modules.coding import Decoded
from modules.guards import EPSILON, Summary
from modules.identity import earlier_identity, model_identity
from modules.rans import BitstreamError

MAGIC = b"HPCM"
VERSION = 2
READABLE = 1, 2
RGB = 0
MAX_PIXELS = 2**26
"""Images beyond this many pixels, padded, are neither written nor read: it bounds what a forged size can ask for."""
MOST_BYTES = 64
"""Bytes of the strings for each padded pixel, at most."""
MAX_PROFILE = 2**24
"""Bytes of an ICC profile, at most."""

_GRID = 128
"""Every codec pads height and width to a multiple of this, or of a multiple of it."""

_HEADER = struct.Struct("<4sBB8sIIIII")
_CHECK = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size


@dataclass(frozen=True)
class Header:
    """What a file says of itself before the coded image; `identity` is the model's."""

    identity: bytes
    height: int
    width: int
    icc_length: int
    z_length: int
    y_length: int
    version: int = VERSION

    def pack(self) -> bytes:
        """The header's bytes, checksum included."""
        *values, version = astuple(self)
        fields = _HEADER.pack(MAGIC, version, RGB, *values)
        return fields + _CHECK.pack(zlib.crc32(fields))

    @classmethod
    def parse(cls, data: bytes) -> "Header":
        """Read the first `HEADER_BYTES` of a file; raises BitstreamError saying what is wrong with them."""
        if data[:4] != MAGIC[: len(data)]:
            raise BitstreamError("not an HPCM file: it does not begin with HPCM")
        if len(data) > 4 and data[4] not in READABLE:
            raise BitstreamError(f"format version {data[4]}; this program reads versions 1 and {VERSION}")
        if len(data) < HEADER_BYTES:
            raise BitstreamError(f"truncated: {len(data)} bytes, where the header alone has {HEADER_BYTES}")
        fields = data[: _HEADER.size]
        if _CHECK.unpack(data[_HEADER.size : HEADER_BYTES]) != (zlib.crc32(fields),):
            raise BitstreamError("damaged: the header does not match its checksum")
        _, version, color, *values = _HEADER.unpack(fields)
        header = cls(*(*values, version))
        if color != RGB:
            raise BitstreamError(f"color format {color}; this program reads {RGB} (RGB, 8 bits a channel)")
        _check_size(header.height, header.width)
        _check_lengths(header)
        return header

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return HEADER_BYTES + self.icc_length + self.z_length + self.y_length + _CHECK.size


@dataclass(frozen=True)
class CodedImage:
    """One image as a file holds it: identity of the model, size in pixels, strings of z and y, ICC profile or b"".

    `version` is that of the format; files are written in the newest.
    """

    identity: bytes
    height: int
    width: int
    z: bytes
    y: bytes
    icc_profile: bytes = b""
    version: int = VERSION

    @property
    def guards(self) -> Summary | None:
        """What the file says of the arithmetic it allows for, None in version 1; raises BitstreamError if damaged."""
        return None if self.version == 1 else Summary.of(self.y)

    def pack(self) -> bytes:
        """The file's bytes."""
        lengths = len(self.icc_profile), len(self.z), len(self.y)
        body = self.icc_profile + self.z + self.y
        header = Header(self.identity, self.height, self.width, *lengths, self.version)
        return header.pack() + body + _CHECK.pack(zlib.crc32(body))

    @classmethod
    def parse(cls, data: bytes) -> "CodedImage":
        """Read a file's bytes; raises BitstreamError, which says what is wrong, before anything is decoded."""
        return cls._read(io.BytesIO(data), len(data))

    @classmethod
    def read(cls, path: Path) -> "CodedImage":
        """Read a file, of which no more than the header unless its length is the announced one."""
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
        return cls(header.identity, header.height, header.width, z, y, icc_profile, header.version)


class ImageCodec:
    """A model as a codec of files; its coding tables are built if they are not yet."""

    def __init__(self, model: HPCM):
        model.update()
        self.model = model.eval()
        self.identity = model_identity(model)
        names = self.identity, earlier_identity(model)
        self.identities = frozenset(name for name in names if name is not None)

    def encode(self, image: Tensor, icc_profile: bytes = b"", epsilon: float = EPSILON) -> CodedImage:
        """Code one image (1, 3, H, W) in [0, 1], for decoders within ε; raises BitstreamError where it is too large."""
        self.model.check_images(image)
        if len(image) > 1:
            raise ValueError(f"a file holds one image, not {len(image)}: encode them one by one")
        height, width = image.shape[2:]
        _check_size(height, width)
        (y,), (z,) = self.model.compress(image, epsilon)["strings"]
        return CodedImage(self.identity, height, width, z, y, icc_profile)

    def decode(self, coded: CodedImage) -> Decoded:
        """The image, and what recovery it needed; raises BitstreamError for another model's, and where that fails."""
        if coded.identity not in self.identities:
            raise BitstreamError(
                f"made by another model: {coded.identity.hex()}, where this checkpoint is {self.identity.hex()}"
            )
        if version1.wrote(coded.y) != (coded.version == 1):
            raise BitstreamError(f"damaged: its latent is not of version {coded.version}")
        decoded = self.model.decompress([[coded.y], [coded.z]], (coded.height, coded.width))
        return Decoded(decoded["x_hat"], decoded["recovery"][0])


def _check_size(height: int, width: int) -> None:
    padded = -(-height // _GRID) * -(-width // _GRID) * _GRID**2
    if not 1 <= padded <= MAX_PIXELS:
        raise BitstreamError(f"{width}×{height} pixels: images have 1 to {MAX_PIXELS} pixels, padding included")


def _check_lengths(header: Header) -> None:
    """Raise BitstreamError for strings longer than any codec's, which reading would fill the memory with."""
    padded = -(-header.height // _GRID) * -(-header.width // _GRID) * _GRID**2
    if header.z_length + header.y_length > MOST_BYTES * padded or header.icc_length > MAX_PROFILE:
        raise BitstreamError(f"{header.file_bytes} bytes: far more than {header.width}×{header.height} pixels can have")
