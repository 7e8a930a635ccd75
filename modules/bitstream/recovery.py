"""What a decoder does if its symbols differ from the encoder's: it computes in float64, then tries other tables."""

import copy
import itertools
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from modules.bitstream.coders import Decoder, StepMismatch
from modules.bitstream.guards import STEPS, Guards, moved, nearest_boundary, table_index
from modules.bitstream.rans import RewindingReader

SINGLES, PAIRED = 64, 16
"""Numbers of symbols, nearest to a boundary first, whose other table is tried: alone, and in pairs."""

SYMBOLS_AGAIN = 2**25
"""Most symbols that all trials together read again, which takes seconds. Each trial reads the stream from its start."""

Model = TypeVar("Model", bound=nn.Module)


class RecoveringDecoder(Decoder):
    """Reads each step's symbols. If they are not the encoder's, it tries the tables across the nearest boundaries.

    Raises StepMismatch if no trial succeeds.
    """

    def __init__(self, scale_table: Tensor, reader: RewindingReader, guards: Guards):
        super().__init__(scale_table, reader, guards)
        self.rewinding = reader
        self.budget = SYMBOLS_AGAIN
        self.trials = 0
        self.corrected = 0
        """Number of symbols whose table was found by trial."""

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
        # If all trials fail, three symbols crossed a boundary, or one that was not tried. It was at least as far from
        # its boundary as the third nearest.
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
            f" by more than the file's ε = {self.guards.epsilon:.1g}. Decoding in float64 did not help, nor did "
            f"{self.trials} other choices of tables. If the cause is rounding, this step needs an ε above {least:.1e}: "
            "encode the image again with `hpcm compress --epsilon`"
        )

    def note(self, step: int) -> str:
        """How the image was recovered, after float32 gave other symbols than the encoder's at this step."""
        trials = f", with {self.corrected} tables found in {self.trials} trials" if self.trials else ""
        return (
            f"decoded in float64{trials}: at coding step {step + 1} of {STEPS}, float32 on this machine was off by "
            f"more than the file's ε = {self.guards.epsilon:.1g}"
        )


def _flips(count: int) -> Iterator[tuple[int, ...]]:
    """The symbols to try with their other table, out of the `count` nearest: each alone, then pairs of the first."""
    yield from ((one,) for one in range(count))
    yield from sorted(itertools.combinations(range(min(count, PAIRED)), 2), key=sum)


def in_float64(model: Model) -> Model:
    """A copy of the model in float64 on the CPU. There every layer has a float64 kernel."""
    return copy.deepcopy(model).to("cpu", torch.float64)
