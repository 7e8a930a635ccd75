"""Symbols of tables to bytes and back, with the compiled coder or, without a compiler, with CompressAI's.

Both write and read the same bytes. The compiled one, `cuda/cpu/range_coder.cpp`, takes a tenth of the time and does not
hold Python's lock.
"""

import ctypes
import functools
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.bitstream.file_format import BitstreamError
from modules.bitstream.tables import CodingTables
from modules.compressai_parts import RansDecoder, RansEncoder
from modules.native_build import BuildError, build_cpu

STATE_BYTES = 8
"""Bytes of the state, with which a stream begins."""
_LOWEST_STATE = 2**31
_STREAM_ENDS = 3
_logger = logging.getLogger(__name__)


class _Tables(ctypes.Structure):
    """The same fields as `RangeCoderTables` in `cuda/cpu/range_coder.cpp`."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("starts", "cdfs", "lowest", "first")],
    ]

    @classmethod
    def of(cls, tables: CodingTables) -> "_Tables":
        """The addresses of the tables' arrays, which must stay alive."""
        parts = (tables.starts, tables.cdfs, tables.lowest, tables.first)
        return cls(len(tables.lowest), *(part.ctypes.data for part in parts))


class _Stream(ctypes.Structure):
    """The same fields as `RangeCoderStream`."""

    _fields_ = [("state", ctypes.c_uint64), ("next", ctypes.c_void_p), ("end", ctypes.c_void_p)]


@functools.cache
def compiled() -> Any | None:
    """The compiled coder's library, built if needed. None if that fails; the log says why."""
    try:
        library = ctypes.CDLL(str(build_cpu("range_coder")))  # Releases Python's lock during a call.
    except (BuildError, OSError) as error:
        _logger.info("range coding is slower, with CompressAI's coder: %s", error)
        return None
    pointer = ctypes.c_void_p
    library.range_coder_encode.argtypes = [pointer, pointer, pointer, ctypes.c_int64, pointer, pointer]
    library.range_coder_decode.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int64]
    return library


def encode(symbols: Tensor, indexes: Tensor, tables: CodingTables) -> bytes:
    """The stream of whole numbers `symbols`, each with the index of its table, both (count,).

    Raises ValueError for a table that does not exist and for a symbol that its table lacks.
    """
    symbols, indexes = _array(symbols), _array(indexes)
    if symbols.shape != indexes.shape:
        raise ValueError("each symbol needs the index of its table")
    library = compiled()
    if library is None:
        coded: bytes = RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *tables.lists)
        return coded
    words, written = np.empty(symbols.numel() + 2, np.uint32), ctypes.c_int64()
    addresses = ctypes.byref(_Tables.of(tables)), indexes.data_ptr(), symbols.data_ptr()
    end = words.ctypes.data + words.nbytes
    _check(library.range_coder_encode(*addresses, symbols.numel(), end, ctypes.byref(written)))
    return words[-written.value :].tobytes()


class RangeDecoder:
    """Reads the output of `encode`. `most` limits the bytes that all symbols together can take.

    Raises BitstreamError for bytes that `encode` never writes, if the coder can tell.
    """

    def __init__(self, coded: bytes, tables: CodingTables, most: int):
        state = int.from_bytes(coded[:STATE_BYTES], "little")
        # From this state on the coder reads one 32-bit word per 32 bits of symbols. Below it, one per symbol.
        if len(coded) < STATE_BYTES or len(coded) % 4 or state < _LOWEST_STATE:
            raise BitstreamError("damaged: this is not a range coder's stream")
        self.tables = tables
        self.library = compiled()
        if self.library is None:  # CompressAI's decoder does not check where its input ends.
            self.plain = RansDecoder()
            self.plain.set_stream(coded + bytes(most))
        else:
            self.bytes = np.frombuffer(coded, np.uint8)
            begin = self.bytes.ctypes.data
            self.stream = _Stream(state, begin + STATE_BYTES, begin + len(coded))

    def decode(self, indexes: Tensor) -> Tensor:
        """The next symbols, int32 on the CPU, each of the table of its index. Both are (count,)."""
        indexes = _array(indexes)
        if self.library is None:
            found = self.plain.decode_stream(indexes.tolist(), *self.tables.lists)
            return torch.from_numpy(np.array(found, np.int32))
        symbols = torch.empty_like(indexes)
        _check(
            self.library.range_coder_decode(
                ctypes.byref(_Tables.of(self.tables)), ctypes.byref(self.stream),
                indexes.data_ptr(), symbols.data_ptr(), indexes.numel(),
            )
        )  # fmt: skip
        return symbols


def _array(numbers: Tensor) -> Tensor:
    """The numbers as the compiled coder reads them."""
    return numbers.to("cpu", torch.int32).contiguous()


def _check(status: int) -> None:
    if status == _STREAM_ENDS:
        raise BitstreamError("damaged, or written with other weights: the stream ends before its last symbol")
    if status:
        raise ValueError("a coding table does not exist, or lacks the symbol to be coded")
