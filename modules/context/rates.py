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

import torch
from torch import Tensor, nn

from modules.context.coding_order import EIGHTHS, CodeStep, Step
from modules.layers.transforms import Changes

STEPS_WITH_VECTORS = 10


class Rate:
    """The vectors of qualities (B,) from 1 to R. Each is computed, in float64, where it is asked for."""

    def __init__(self, vectors: "RateVectors", quality: Tensor):
        self._vectors = vectors
        position = quality.double() - 1
        below = position.floor().clamp(0, len(vectors.rates) - 2)
        self._below, self._share = below.long(), (position - below)[:, None]

    @property
    def gain(self) -> Tensor:
        """(B, M): how many symbols a unit of y has."""
        return self._factors(self._vectors.gain)

    @property
    def inverse_gain(self) -> Tensor:
        """(B, M): how many units of y a symbol has."""
        return self._factors(self._vectors.inverse_gain)

    @property
    def steps(self) -> Tensor:
        """(B, 10, 3M): factors of the step vectors."""
        return self._factors(self._vectors.steps)

    @property
    def g_a(self) -> Changes:
        """What adapts each layer of g_a."""
        return self._changes(0, self._vectors.g_a)

    @property
    def g_s(self) -> Changes:
        """What adapts each layer of g_s."""
        return self._changes(sum(self._vectors.g_a), self._vectors.g_s)

    @property
    def lmbda(self) -> Tensor:
        """λ (B,), float64, interpolated geometrically."""
        # A CUDA graph cannot hold a copy from the processor's memory, as `torch.tensor` makes one.
        rates = torch.stack([self._share.new_full((1,), rate) for rate in self._vectors.rates])
        return self._between(rates.log()).exp().squeeze(1)

    def coded(self, code: CodeStep) -> CodeStep:
        """A `CodeStep` for the units of y from one for the units of symbols."""
        vectors = self.gain, self.inverse_gain

        def run(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            gain, inverse = (_of_rows(of_channels, step.rows) for of_channels in vectors)
            symbols_mean = means * gain
            return (code(step, scales * gain, symbols_mean) - symbols_mean) * inverse + means

        return run

    def in_symbols(self, y_rows: Tensor) -> Tensor:
        """All rows of y (B, 8·h·w, M/8) in the units of symbols."""
        return y_rows * _of_rows(self.gain, torch.arange(y_rows.shape[1], device=y_rows.device))

    def _between(self, vectors: Tensor) -> Tensor:
        flat = vectors.flatten(1).double()
        between = torch.lerp(flat[self._below], flat[self._below + 1], self._share)
        return between.unflatten(1, vectors.shape[1:])

    def _factors(self, logs: Tensor) -> Tensor:
        return self._between(logs).exp().to(logs.dtype)

    def _changes(self, first: int, channels: list[int]) -> Changes:
        part = slice(first, first + sum(channels))
        scales, shifts = self._factors(self._vectors.scales[:, part]), self._between(self._vectors.shifts[:, part])
        pieces = (x[:, :, None, None].split(channels, dim=1) for x in (scales, shifts.to(scales.dtype)))
        return list(zip(*pieces, strict=True))


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
        self.g_a, self.g_s = list(g_a), list(g_s)
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
