"""Vectors with which one codec codes at every rate between those of several λ.

A gain for each channel of y makes the quantization of its residuals finer or coarser, and an inverse gain brings them
back (gain units: Cui et al., CVPR 2021). A factor for each coding step adapts the step vectors of the priors. A scale
and a shift for each channel adapt the output of every layer of g_a and g_s, because at low rates a good encoder removes
details before it quantizes. Each λ has its own vectors. Between two λ, shifts are interpolated linearly and all others
geometrically. The networks see y on its own scale at every rate, so a codec that was trained for one λ codes at other
rates before any training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.context.coding_order import EIGHTHS, CodeStep, Step
from modules.layers.transforms import Changes

STEPS_WITH_VECTORS = 10


@dataclass(frozen=True)
class Rate:
    """The vectors of one rate, or those of each sample of a batch."""

    gain: Tensor
    """(B or 1, M): how many symbols a unit of y has."""
    inverse_gain: Tensor
    """(B or 1, M): how many units of y a symbol has."""
    steps: Tensor
    """(B or 1, 10, 3M): factors of the step vectors."""
    g_a: Changes
    """What adapts each layer of g_a."""
    g_s: Changes
    """What adapts each layer of g_s."""

    def step_factor(self, step: Step) -> Tensor:
        """The factor of a step's vector, (B or 1, 3M, 1, 1)."""
        return self.steps[:, step.number - 1, :, None, None]

    def coded(self, code: CodeStep) -> CodeStep:
        """A `CodeStep` for the units of y from one for the units of symbols."""

        def run(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            gain, inverse = (self._of_rows(vectors, step.rows) for vectors in (self.gain, self.inverse_gain))
            symbols_mean = means * gain
            return (code(step, scales * gain, symbols_mean) - symbols_mean) * inverse + means

        return run

    def in_symbols(self, y_rows: Tensor) -> Tensor:
        """All rows of y (B, 8·h·w, M/8) in the units of symbols."""
        return y_rows * self._of_rows(self.gain, torch.arange(y_rows.shape[1], device=y_rows.device))

    @staticmethod
    def _of_rows(vectors: Tensor, rows: Tensor) -> Tensor:
        """The entries of (B, M) vectors for rows of y, (B, R, M/8). Row p·8 + e holds eighth e of the channels."""
        return vectors.unflatten(1, (EIGHTHS, -1)).index_select(1, rows % EIGHTHS)


class RateVectors(nn.Module):
    """The vectors of every λ in `rates`. Quality 1 is the first λ, and quality R the last.

    `g_a` and `g_s` are the numbers of output channels of these transforms' layers.
    """

    def __init__(self, rates: Sequence[float], M: int, g_a: Sequence[int], g_s: Sequence[int]):
        super().__init__()
        self.rates = tuple(rates)
        self._layers = tuple(g_a), tuple(g_s)
        count, channels = len(self.rates), sum(g_a) + sum(g_s)
        self.gain = nn.Parameter(torch.zeros(count, M))
        self.inverse_gain = nn.Parameter(torch.zeros(count, M))
        self.steps = nn.Parameter(torch.zeros(count, STEPS_WITH_VECTORS, 3 * M))
        self.scales = nn.Parameter(torch.zeros(count, channels))
        self.shifts = nn.Parameter(torch.zeros(count, channels))

    @torch.no_grad()
    def start_from(self, lmbda: float) -> None:
        """Set the vectors for the weights of a codec that was trained for one λ: gains √(λ_r / λ), no other change."""
        for vectors in self.parameters():
            vectors.zero_()
        for number, rate in enumerate(self.rates):
            self.gain[number] = math.log(rate / lmbda) / 2
            self.inverse_gain[number] = -math.log(rate / lmbda) / 2

    def at(self, quality: Tensor) -> Rate:
        """The vectors at qualities (B,) from 1 to R. They are computed in float64, so machines hardly differ."""
        below, share = self._between(quality)

        def between(vectors: Tensor) -> Tensor:
            flat = vectors.flatten(1).double()
            return torch.lerp(flat[below], flat[below + 1], share[:, None]).unflatten(1, vectors.shape[1:])

        def factors(logs: Tensor) -> Tensor:
            return between(logs).exp().to(logs.dtype)

        of_g_a, of_g_s = self._layers
        scales, shifts = factors(self.scales), between(self.shifts).to(self.shifts.dtype)
        pieces = (vectors[:, :, None, None].split([*of_g_a, *of_g_s], dim=1) for vectors in (scales, shifts))
        changes = list(zip(*pieces, strict=True))
        return Rate(
            factors(self.gain),
            factors(self.inverse_gain),
            factors(self.steps),
            changes[: len(of_g_a)],
            changes[len(of_g_a) :],
        )

    def lmbda_at(self, quality: Tensor) -> Tensor:
        """The λ at qualities (B,), interpolated geometrically."""
        # A CUDA graph cannot hold a copy from the processor's memory, as `torch.tensor` makes one.
        rates = [torch.full((), rate, dtype=torch.float64, device=quality.device) for rate in self.rates]
        logs = torch.stack(rates).log()
        below, share = self._between(quality)
        return torch.lerp(logs[below], logs[below + 1], share).exp()

    def _between(self, quality: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the λ below each quality, from 0, and how far the quality is on the way to the next."""
        position = quality.double() - 1
        below = position.floor().clamp(0, len(self.rates) - 2)
        return below.long(), position - below

    def quality_of(self, lmbda: float) -> float:
        """The quality of a λ. Raises ValueError if it is not between the first and the last."""
        first, last = self.rates[0], self.rates[-1]
        if not first <= lmbda <= last:
            raise ValueError(f"λ = {lmbda}: the codec has rates from λ = {first} to {last}")
        upper = next(number for number, rate in enumerate(self.rates) if rate >= lmbda)
        if upper == 0:
            return 1.0
        below, above = self.rates[upper - 1], self.rates[upper]
        return upper + math.log(lmbda / below) / math.log(above / below)
