"""The three ways to code one step of the hierarchy: estimate its likelihoods, encode it, decode it."""

import torch
from compressai.ops import quantize_ste
from torch import Tensor

from modules.hierarchy import Step
from modules.rans import SymbolReader, SymbolWriter


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
    """Writes each step's symbols."""

    def __init__(self, y_rows: Tensor, scale_table: Tensor, writer: SymbolWriter):
        self.y_rows, self.scale_table, self.writer = y_rows, scale_table, writer

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Code (1, R, M/8) rows; returns ŷ there."""
        symbols = (self.y_rows.index_select(1, step.rows) - means).round()
        return self.writer.put(symbols, table_index(scales, self.scale_table)) + means


class Decoder:
    """Reads each step's symbols."""

    def __init__(self, scale_table: Tensor, reader: SymbolReader):
        self.scale_table, self.reader = scale_table, reader

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode (1, R, M/8) rows; returns ŷ there."""
        return self.reader.take(table_index(scales, self.scale_table)) + means


def table_index(scales: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of `table` that is nearest to each scale, by ratio.

    Always rounding up to the next entry would widen scales by 5 % on average. On ten photographs and weights of 1400
    training steps, streams were 0.1 to 0.2 % longer than the likelihoods' estimate with the nearest, and −0.3 to +1.4 %
    off it with the next larger.
    """
    return torch.bucketize(scales, (table[1:] * table[:-1]).sqrt(), out_int32=True)
