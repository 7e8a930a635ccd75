"""The ways to code one step of the hierarchy with the range coder: encode it, or decode it."""

import torch
from torch import Tensor

from modules.bitstream.file_format import BitstreamError
from modules.bitstream.guards import STEPS, Guards, Offsets, choose_offsets, moved, shortened, table_index
from modules.bitstream.rans import SymbolReader, SymbolWriter
from modules.context.coding_order import Step


class Encoder:
    """Finds each step's symbols. A GPU computes all steps before the first symbol is written."""

    def __init__(self, y_rows: Tensor):
        self.y_rows = y_rows
        self.steps: list[tuple[Tensor, Tensor]] = []
        """Symbols, as floats, and scales of each step, both (1, R, M/8)."""

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Round the step's rows, (1, R, M/8); returns ŷ of these rows."""
        symbols = (self.y_rows.index_select(1, step.rows) - means).round()
        self.steps.append((symbols, scales))
        return symbols.int() + means

    def write(self, scale_table: Tensor, writer: SymbolWriter, epsilon: float) -> Guards:
        """Write the symbols of all steps. Returns what a decoder needs in addition to them.

        Every decoder whose scales are within ε chooses the same tables.
        """
        offsets: list[Offsets] = []
        checks: list[int] = []
        for number, (symbols, scales) in enumerate(self.steps):
            offsets.append(choose_offsets(scales, scale_table, epsilon))
            writer.put(symbols, table_index(moved(scales, offsets[-1], epsilon), scale_table))
            checks.append(shortened(number, writer.check))
        return Guards(epsilon, tuple(offsets), tuple(checks))


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
        self.scales: list[Tensor] = []
        self.symbols: list[Tensor] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode the step's rows, (1, R, M/8); returns ŷ of these rows."""
        try:
            symbols = self.reader.take(self.guards.index(step.number, scales, self.scale_table))
        except BitstreamError as error:  # The code of a large value does not end, because of wrong tables or damage.
            raise StepMismatch(step.number) from error
        if not self.guards.matches(step.number, self.reader.check):
            raise StepMismatch(step.number)
        self.scales.append(scales.flatten())
        self.symbols.append(symbols.flatten())
        return symbols + means

    @property
    def recorded(self) -> tuple[Tensor, Tensor]:
        """Scales and symbols of all steps, both (symbols,), in coding order: to compare machines or precisions."""
        return torch.cat(self.scales), torch.cat(self.symbols)
