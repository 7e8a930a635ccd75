"""Symbols of any size to bytes and back, safe for any input bytes.

CompressAI's own escape code reads without limit on wrong bytes. So every symbol here belongs to a table and takes 16
bits at most. A value outside its table is coded as the table's escape symbol, followed by its excess over the table in
bytes, which are symbols of a uniform table. This bounds the number of bytes that any stream can make the decoder read.
"""

import zlib

import torch
from torch import Tensor

from modules.bitstream.file_format import BitstreamError
from modules.bitstream.range_coder import STATE_BYTES, RangeDecoder, encode
from modules.bitstream.tables import CodingTables

LIMIT = 2**24
"""Symbols are below this magnitude, so float32 represents them exactly."""

_EXCESS_BYTES = 4
_CHECK_BYTES = 4
_MISMATCH = (
    "the symbols do not match their check value: the stream is damaged, was written with other "
    "weights, or comes from a machine that rounds differently (another processor, device or version of PyTorch)"
)


class SymbolWriter:
    """Collects symbols in the processor's memory and codes them in one call."""

    def __init__(self, tables: CodingTables):
        self.tables = tables
        self.symbols: list[Tensor] = []
        self.indexes: list[Tensor] = []
        self.check = 0

    def put(self, values: Tensor, indexes: Tensor) -> None:
        """Add whole numbers, as floats, with their tables `indexes`, both of one shape.

        Raises BitstreamError for NaN and for magnitudes of 2²⁴ or more.
        """
        values, indexes = values.cpu().flatten(), indexes.cpu().flatten().int()
        lowest, highest = values.aminmax()  # NaN if any value is.
        if not (float(lowest) > -LIMIT and float(highest) < LIMIT):
            raise BitstreamError("the latent is not finite or too large to code: check image and weights for NaN")
        symbols, reach = values.int(), self.tables.reach.index_select(0, indexes)
        self.check = _checksum(self.check, symbols, indexes)
        magnitudes = symbols.abs()
        outside = (magnitudes > reach).nonzero().flatten()
        excess = 2 * (magnitudes[outside] - reach[outside] - 1) + (symbols[outside] < 0)
        symbols[outside] = reach[outside] + 1
        self._append(symbols, indexes)
        while len(excess):
            rest = excess >> 7
            byte = (excess & 127) + 128 * (rest > 0)
            self._append(byte, torch.full_like(byte, self.tables.byte))
            excess = rest[rest > 0]

    def _append(self, symbols: Tensor, indexes: Tensor) -> None:
        self.symbols.append(symbols.int())
        self.indexes.append(indexes.int())

    def coded(self) -> bytes:
        """All symbols as the range coder's bytes."""
        return encode(torch.cat(self.symbols), torch.cat(self.indexes), self.tables)

    def string(self) -> bytes:
        """The check value of all symbols and tables, then the range coder's bytes."""
        return self.check.to_bytes(_CHECK_BYTES, "little") + self.coded()


class SymbolReader:
    """Reads the range coder's bytes. `count` is the total number of symbols.

    Raises BitstreamError for bytes that no writer wrote: at once, while reading, or in `finish`.
    """

    def __init__(self, coded: bytes, tables: CodingTables, count: int):
        self.tables, self.check = tables, 0
        self.decoder = RangeDecoder(coded, tables, longest(count))

    def take(self, indexes: Tensor) -> Tensor:
        """Read the next symbols, int32, in the shape of `indexes`."""
        flat = indexes.flatten().cpu().int()  # What follows is the processor's work: a GPU waits once for each step.
        reach = self.tables.reach.index_select(0, flat)
        symbols = self.decoder.decode(flat)
        outside = (symbols > reach).nonzero().flatten()
        if len(outside):
            excess = self._decode_excess(len(outside))
            magnitude = reach[outside] + 1 + (excess >> 1)
            symbols[outside] = torch.where(excess % 2 > 0, -magnitude, magnitude)
        self.check = _checksum(self.check, symbols, flat)
        return symbols.view(indexes.shape).to(indexes.device)

    def _decode_excess(self, count: int) -> Tensor:
        excess = torch.zeros(count, dtype=torch.int32)
        pending = torch.arange(count)
        for shift in range(0, 7 * _EXCESS_BYTES, 7):
            byte = self.decoder.decode(torch.full_like(pending, self.tables.byte, dtype=torch.int32))
            excess[pending] += (byte & 127) << shift
            pending = pending[byte > 127]
            if not len(pending):
                return excess
        raise BitstreamError(_MISMATCH)

    def finish(self, check: int) -> None:
        """Raise BitstreamError unless the symbols read and their tables have the writer's check value."""
        if self.check != check:
            raise BitstreamError(_MISMATCH)


def split_check(string: bytes) -> tuple[int, bytes]:
    """Split the output of `SymbolWriter.string` into the check value and the range coder's bytes."""
    return int.from_bytes(string[:_CHECK_BYTES], "little"), string[_CHECK_BYTES:]


def longest(count: int) -> int:
    """The most bytes that `count` symbols can take: 2 each, 1 for each byte of an excess, and 1 for rounding."""
    return STATE_BYTES + (2 + _EXCESS_BYTES + 1) * count


def _checksum(check: int, symbols: Tensor, indexes: Tensor) -> int:
    return zlib.crc32(indexes.numpy().data, zlib.crc32(symbols.numpy().data, check))
