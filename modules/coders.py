"""The three ways to code one step of the hierarchy: estimate its likelihoods, encode it, decode it."""

from dataclasses import dataclass
from typing import Any

import torch
from compressai.ans import RansDecoder, RansEncoder
from compressai.ops import quantize_ste
from torch import Tensor

from modules.hierarchy import Step


@dataclass(frozen=True)
class CodingTables:
    """The range coder's view of a set of distributions: CDFs, their lengths and offsets, a list entry each."""

    cdfs: list[list[int]]
    lengths: list[int]
    offsets: list[int]

    @classmethod
    def from_buffers(cls, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> "CodingTables":
        """Tables from the model's buffers (n, longest), (n,) and (n,)."""
        return cls(cdfs.tolist(), lengths.tolist(), offsets.tolist())

    def encode(self, symbols: Tensor, indexes: Tensor) -> bytes:
        """Code integer `symbols` with the distributions `indexes`, both of one shape, in memory order."""
        return RansEncoder().encode_with_indexes(
            symbols.flatten().tolist(), indexes.flatten().tolist(), self.cdfs, self.lengths, self.offsets
        )

    def decode(self, decoder: Any, indexes: Tensor) -> Tensor:
        """The next symbols of `decoder`, in the shape of `indexes`."""
        symbols = decoder.decode_stream(indexes.flatten().tolist(), self.cdfs, self.lengths, self.offsets)
        return torch.tensor(symbols, dtype=torch.int32, device=indexes.device).view(indexes.shape)


class Estimator:
    """Rounds each step's residual and keeps it, with its scales, for the likelihoods."""

    def __init__(self, y_rows: Tensor, training: bool):
        self.y_rows, self.round = y_rows, quantize_ste if training else torch.round
        self.residuals: list[Tensor] = []
        self.scales: list[Tensor] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Code (B, R, M/8) rows; returns ŷ there."""
        residual = self.y_rows.index_select(1, step.rows) - means
        self.residuals.append(residual)
        self.scales.append(scales)
        return self.round(residual) + means

    def collected(self, restore: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (before rounding) and scales of all steps as rows of y."""
        return tuple(torch.cat(rows, dim=1).index_select(1, restore) for rows in (self.residuals, self.scales))  # type: ignore[return-value]


class Encoder:
    """Collects each step's symbols and distributions, to be coded in one call."""

    def __init__(self, y_rows: Tensor, scale_table: Tensor):
        self.y_rows, self.scale_table = y_rows, scale_table
        self.symbols: list[Tensor] = []
        self.indexes: list[Tensor] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Code (1, R, M/8) rows; returns ŷ there."""
        symbols = (self.y_rows.index_select(1, step.rows) - means).round()
        self.symbols.append(symbols.int())
        self.indexes.append(table_index(scales, self.scale_table))
        return symbols + means

    def string(self, tables: CodingTables) -> bytes:
        """The bitstream of all steps."""
        return tables.encode(torch.cat(self.symbols, dim=1), torch.cat(self.indexes, dim=1))


class Decoder:
    """Reads each step's symbols from a bitstream."""

    def __init__(self, string: bytes, tables: CodingTables, scale_table: Tensor):
        self.tables, self.scale_table = tables, scale_table
        self.stream = RansDecoder()
        self.stream.set_stream(string)

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode (1, R, M/8) rows; returns ŷ there."""
        return self.tables.decode(self.stream, table_index(scales, self.scale_table)) + means


def table_index(scales: Tensor, table: Tensor) -> Tensor:
    """Index of the first scale of `table` that a latent's scale does not exceed; the last one if it exceeds all."""
    return torch.bucketize(scales, table).clamp_max(len(table) - 1)
