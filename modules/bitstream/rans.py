"""Symbols to bytes and back with CompressAI's range coder, safe for any input bytes.

CompressAI's decoder does not check where its input ends, and its escape code reads without limit on wrong bytes. So
every symbol here belongs to a table and takes 16 bits at most. A value outside its table is coded as the table's escape
symbol, followed by its excess over the table in bytes, which are symbols of a uniform table. This bounds the number of
bytes that any stream can make the decoder read. The reader appends that many zeros to the stream.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from modules.bitstream.file_format import BitstreamError
from modules.bitstream.tables import CodingTables
from modules.compressai_parts import RansDecoder, RansEncoder

LIMIT = 2**24
"""Symbols are below this magnitude, so float32 represents them exactly."""

_EXCESS_BYTES = 4
_LOWEST_STATE = 2**31
_CHECK_BYTES = 4
_STATE_BYTES = 8
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
        values, indexes = values.cpu(), indexes.cpu()
        if not bool((values.abs() < LIMIT).all()):
            raise BitstreamError("the latent is not finite or too large to code: check image and weights for NaN")
        symbols = values.int()
        reach = self.tables.reach[indexes]
        outside = symbols.abs() > reach
        self._append(torch.where(outside, reach + 1, symbols), indexes)
        excess = 2 * (symbols.abs() - reach - 1)[outside] + (symbols[outside] < 0)
        while len(excess):
            rest = excess >> 7
            byte = (excess & 127) + 128 * (rest > 0)
            self._append(byte, torch.full_like(byte, self.tables.byte))
            excess = rest[rest > 0]
        self.check = _checksum(self.check, symbols, indexes)

    def _append(self, symbols: Tensor, indexes: Tensor) -> None:
        self.symbols.append(symbols.flatten())
        self.indexes.append(indexes.flatten().int())

    def coded(self) -> bytes:
        """All symbols as the range coder's bytes."""
        tables = self.tables
        symbols, indexes = torch.cat(self.symbols).tolist(), torch.cat(self.indexes).tolist()
        coded: bytes = RansEncoder().encode_with_indexes(symbols, indexes, tables.cdfs, tables.lengths, tables.offsets)
        return coded

    def string(self) -> bytes:
        """The check value of all symbols and tables, then the range coder's bytes."""
        return self.check.to_bytes(_CHECK_BYTES, "little") + self.coded()


class SymbolReader:
    """Reads the range coder's bytes. `count` is the total number of symbols.

    Raises BitstreamError for bytes that no writer wrote: at once, while reading, or in `finish`.
    """

    def __init__(self, coded: bytes, tables: CodingTables, count: int):
        state = int.from_bytes(coded[:_STATE_BYTES], "little")
        # From this state on the coder reads one 32-bit word per 32 bits of symbols. Below it, one per symbol.
        if len(coded) < _STATE_BYTES or len(coded) % 4 or state < _LOWEST_STATE:
            raise BitstreamError("damaged: this is not a range coder's stream")
        self.tables, self.check = tables, 0
        self.decoder = RansDecoder()
        self.decoder.set_stream(coded + bytes(longest(count)))

    def take(self, indexes: Tensor) -> Tensor:
        """Read the next symbols, int32, in the shape of `indexes`."""
        flat = indexes.flatten().cpu()  # All that follows is the processor's work: a GPU waits once for each step.
        symbols, reach = self._decode(flat), self.tables.reach[flat]
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
            byte = self._decode(torch.full_like(pending, self.tables.byte))
            excess[pending] += (byte & 127) << shift
            pending = pending[byte > 127]
            if not len(pending):
                return excess
        raise BitstreamError(_MISMATCH)

    def _decode(self, indexes: Tensor) -> Tensor:
        tables = self.tables
        symbols = self.decoder.decode_stream(indexes.tolist(), tables.cdfs, tables.lengths, tables.offsets)
        return torch.from_numpy(np.array(symbols, dtype=np.int32))

    def finish(self, check: int) -> None:
        """Raise BitstreamError unless the symbols read and their tables have the writer's check value."""
        if self.check != check:
            raise BitstreamError(_MISMATCH)


def split_check(string: bytes) -> tuple[int, bytes]:
    """Split the output of `SymbolWriter.string` into the check value and the range coder's bytes."""
    return int.from_bytes(string[:_CHECK_BYTES], "little"), string[_CHECK_BYTES:]


def longest(count: int) -> int:
    """The most bytes that `count` symbols can take: 2 each, 1 for each byte of an excess, and 1 for rounding."""
    return _STATE_BYTES + (2 + _EXCESS_BYTES + 1) * count


def _checksum(check: int, symbols: Tensor, indexes: Tensor) -> int:
    for tensor in (symbols, indexes.int()):
        check = zlib.crc32(tensor.flatten().numpy().data, check)
    return check
