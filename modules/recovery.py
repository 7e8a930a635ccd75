"""What a decoder does where its symbols part from the encoder's: the walk in float64, then tables by trial."""

import copy
import itertools
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from modules.coders import Decoder, StepMismatch
from modules.guards import STEPS, Guards, moved, nearest_boundary, table_index
from modules.rans import RewindingReader

SINGLES, PAIRED = 64, 16
"""How many of the symbols nearest to a boundary are tried with their other table, alone and by pairs."""

SYMBOLS_AGAIN = 2**25
"""How many symbols may be read again in all, since every trial reads the stream from its start: seconds."""

Model = TypeVar("Model", bound=nn.Module)


class RecoveringDecoder(Decoder):
    """Reads each step's symbols; where they are not the encoder's, tries the tables across the nearest boundaries.

    Raises StepMismatch where that does not help either.
    """

    def __init__(self, scale_table: Tensor, reader: RewindingReader, guards: Guards):
        super().__init__(scale_table, reader, guards)
        self.rewinding = reader
        self.budget = SYMBOLS_AGAIN
        self.trials = 0
        self.corrected = 0
        """Symbols whose table was found by trial."""

    def _symbols(self, scales: Tensor) -> Tensor | None:
        place = self.rewinding.place
        scales = moved(scales, self.guards.offsets[self.step], self.guards.epsilon)
        indexes = table_index(scales, self.scale_table)
        symbols = self._read(indexes)
        if symbols is not None:
            return symbols
        above, boundary = nearest_boundary(scales.flatten(), self.scale_table)
        distances, nearest = above.abs().topk(min(SINGLES, len(above)), largest=False)
        across = torch.where(above > 0, boundary, boundary + 1).int()
        # Where all trials fail, more than two symbols are across, or one behind many: the third nearest is the least.
        least = float(distances[:3].max()) / 2
        for flips in _flips(len(nearest)):
            if self.budget <= 0:
                least = float(distances[0]) / 2
                break
            self.budget -= self.rewinding.rewind(place) + indexes.numel()
            self.trials += 1
            trial, at = indexes.flatten().clone(), nearest[list(flips)]
            trial[at] = across[at]
            symbols = self._read(trial.view_as(indexes))
            if symbols is not None:
                self.corrected += len(flips)
                return symbols
        raise StepMismatch(self.step, self._explanation(least))

    def _explanation(self, least: float) -> str:
        return (
            f" by more than the file's ε = {self.guards.epsilon:.1g}: float64 did not help, nor did {self.trials} "
            f"other choices of tables next to a boundary. If it is the arithmetic, this step needs an ε above "
            f"{least:.1e} (`hpcm compress --epsilon`)"
        )

    def note(self, step: int) -> str:
        """What was done, where float32 had parted from the encoder at this step."""
        trials = f", with {self.corrected} tables found in {self.trials} trials" if self.trials else ""
        return (
            f"decoded in float64{trials}: at coding step {step + 1} of {STEPS} the float32 of this machine was not "
            f"within the file's ε = {self.guards.epsilon:.1g}"
        )


def _flips(count: int) -> Iterator[tuple[int, ...]]:
    """Which of the `count` nearest symbols to try across their boundary: each alone, then pairs of the first."""
    yield from ((one,) for one in range(count))
    yield from sorted(itertools.combinations(range(min(count, PAIRED)), 2), key=sum)


def in_float64(model: Model) -> Model:
    """A copy of the model in float64 on the CPU, where every layer has such a kernel."""
    return copy.deepcopy(model).to("cpu", torch.float64)
