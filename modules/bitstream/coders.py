"""The three ways to code one step of the hierarchy: estimate its likelihoods, encode it, decode it."""

import torch
from torch import Tensor

from modules.bitstream.guards import STEPS, Guards, Offsets, choose_offsets, moved, shortened, table_index
from modules.bitstream.rans import BitstreamError, SymbolReader, SymbolWriter
from modules.compressai_parts import quantize_ste
from modules.context.coding_order import Step


class Estimator:
    """Rounds each step's residual. Keeps the residual and its scales for the likelihoods."""

    def __init__(self, y_rows: Tensor, training: bool):
        self.y_rows, self.round = y_rows, quantize_ste if training else torch.round
        self.residuals: list[Tensor] = []
        self.scales: list[Tensor] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Round the step's rows, (B, R, M/8); returns ŷ of these rows."""
        residual = self.y_rows.index_select(1, step.rows) - means
        self.residuals.append(residual)
        self.scales.append(scales)
        return self.round(residual) + means

    def collected(self, restore: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (before rounding) and scales of all steps as rows of y."""
        return tuple(torch.cat(rows, dim=1).index_select(1, restore) for rows in (self.residuals, self.scales))  # type: ignore[return-value]


class Encoder:
    """Writes each step's symbols. Every decoder whose scales are within ε chooses the same tables."""

    def __init__(self, y_rows: Tensor, scale_table: Tensor, writer: SymbolWriter, epsilon: float):
        self.y_rows, self.scale_table, self.writer, self.epsilon = y_rows, scale_table, writer, epsilon
        self.offsets: list[Offsets] = []
        self.checks: list[int] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Encode the step's rows, (1, R, M/8); returns ŷ of these rows."""
        symbols = (self.y_rows.index_select(1, step.rows) - means).round()
        offsets = choose_offsets(scales, self.scale_table, self.epsilon)
        indexes = table_index(moved(scales, offsets, self.epsilon), self.scale_table)
        y_hat = self.writer.put(symbols, indexes) + means
        self.offsets.append(offsets)
        self.checks.append(shortened(len(self.checks), self.writer.check))
        return y_hat

    @property
    def guards(self) -> Guards:
        """The data that a decoder needs in addition to the symbols. It is complete once all steps are coded."""
        return Guards(self.epsilon, tuple(self.offsets), tuple(self.checks))


class StepMismatch(BitstreamError):
    """The symbols of coding step `step`, counted from 0, are not those that the encoder wrote."""

    def __init__(self, step: int, explanation: str = ""):
        super().__init__(
            f"coding step {step + 1} of {STEPS}: the symbols do not match their check value: the stream is damaged, "
            f"was written with other weights, or comes from a machine that rounds differently{explanation}"
        )
        self.step = step


class Decoder:
    """Reads each step's symbols. Raises StepMismatch after the first step whose symbols are not the encoder's."""

    def __init__(self, scale_table: Tensor, reader: SymbolReader, guards: Guards):
        self.scale_table, self.reader, self.guards = scale_table, reader, guards
        self.step = -1

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode the step's rows, (1, R, M/8); returns ŷ of these rows."""
        self.step += 1
        symbols = self._symbols(scales)
        if symbols is None:
            raise StepMismatch(self.step)
        return symbols + means

    def _symbols(self, scales: Tensor) -> Tensor | None:
        return self._read(self.guards.index(self.step, scales, self.scale_table))

    def _read(self, indexes: Tensor) -> Tensor | None:
        """Read the symbols with these tables. Returns None if they are not the encoder's."""
        try:
            symbols = self.reader.take(indexes)
        except BitstreamError:  # The code of a large value does not end, because of wrong tables or damage.
            return None
        return symbols if self.guards.matches(self.step, self.reader.check) else None


class RecordingDecoder(Decoder):
    """Keeps every step's scales and symbols, to compare different machines or precisions."""

    def __init__(self, scale_table: Tensor, reader: SymbolReader, guards: Guards):
        super().__init__(scale_table, reader, guards)
        self.scales: list[Tensor] = []
        self.symbols: list[Tensor] = []

    def _symbols(self, scales: Tensor) -> Tensor | None:
        symbols = super()._symbols(scales)
        if symbols is not None:
            self.scales.append(scales.flatten())
            self.symbols.append(symbols.flatten())
        return symbols
