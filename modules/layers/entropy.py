"""Generalized Gaussian entropy model (HPCM: shape β = 1.5): likelihoods, and tables for the range coder."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from modules.compressai_parts import LowerBound, pmf_to_quantized_cdf

SCALE_BOUND = 0.12
LIKELIHOOD_BOUND = 1e-9
TAIL_MASS = 1e-6
"""Probability of a coding table's escape symbol: the mass of both tails together."""
LARGEST_REACH = 2**15 - 2
"""Largest magnitude in a coding table: each of its symbols needs one of 2¹⁶ frequencies."""


class _StandardCDF(torch.autograd.Function):
    """CDF(v) = (1 + sign(v)·P(1/β, |v|^β)) / 2. Its gradient in v is the density; PyTorch's own is NaN at 0."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.beta = beta
        return _standard_cdf(v, beta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        density = 0.5 * ctx.beta * torch.exp(-(v.abs() ** ctx.beta) - math.lgamma(1 / ctx.beta))
        return grads[0] * density, None


def _standard_cdf(v: Tensor, beta: float) -> Tensor:
    return 0.5 * (1 + v.sign() * torch.special.gammainc(torch.full_like(v, 1 / beta), v.abs() ** beta))


class GeneralizedGaussian(nn.Module):
    """The distribution of residuals: shape β, scale at least 0.12, likelihood at least 1e-9."""

    def __init__(self, beta: float = 1.5):
        super().__init__()
        self._shape = beta
        self.register_buffer("beta", torch.tensor([beta]))
        self.scale_lower_bound = LowerBound(SCALE_BOUND)
        self.likelihood_lower_bound = LowerBound(LIKELIHOOD_BOUND)

    def forward(self, residual: Tensor, scales: Tensor) -> Tensor:
        """Probability mass of the unit interval around `residual`. `residual` and `scales` broadcast."""
        scales = self.scale_lower_bound(scales)
        upper = _StandardCDF.apply((residual + 0.5) / scales, self._shape)
        lower = _StandardCDF.apply((residual - 0.5) / scales, self._shape)
        return self.likelihood_lower_bound(upper - lower)

    def tables(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coding tables for (n,) scales: quantized CDFs (n, longest), their lengths (n,) and offsets (n,), int32.

        A table covers −c … c with c = ⌈scale · quantile⌉. Its last symbol is the escape symbol, for all other values.
        Raises ValueError for a scale that is NaN or too large for a table.
        """
        cdfs, lengths, offsets = _tables(self._shape, tuple(scales.tolist()))
        return cdfs.clone(), lengths.clone(), offsets.clone()


def quantile(shape: float, tail: float) -> float:
    """The v above which the standard distribution of shape β has probability `tail`."""
    low, high = torch.zeros((), dtype=torch.float64), torch.full((), 64.0, dtype=torch.float64)
    inverse = torch.full((), 1 / shape, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        above = 0.5 * torch.special.gammaincc(inverse, middle**shape) > tail
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return float(high)


@lru_cache(maxsize=2)  # A codec's two sets of tables, so that they are not computed again for the same weights.
def _tables(shape: float, listed: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    scales = torch.tensor(listed, dtype=torch.float64).clamp_min(SCALE_BOUND)
    reach = torch.ceil(scales * quantile(shape, TAIL_MASS / 2))
    if not (reach <= LARGEST_REACH).all():
        raise ValueError(f"a scale of {float(scales.max()):.4g} is too large for a coding table")
    reach = reach.int()
    cdfs = torch.zeros(len(scales), 2 * int(reach.max()) + 3, dtype=torch.int32)
    for row, scale, c in zip(cdfs, scales, reach.tolist(), strict=True):
        symbols = torch.arange(-c, c + 1, dtype=torch.float64)
        mass = _standard_cdf((symbols + 0.5) / scale, shape) - _standard_cdf((symbols - 0.5) / scale, shape)
        escape = (1 - mass.sum()).clamp_min(0)
        row[: 2 * c + 3] = pmf_to_quantized_cdf(torch.cat((mass, escape[None])), 16)
    return cdfs, 2 * reach + 3, -reach


def scale_table(levels: int = 60, lowest: float = SCALE_BOUND, highest: float = 64.0) -> Tensor:
    """The scales of the coding tables, log-spaced, (levels,) float32.

    They are computed in float64 and rounded, so they are the same on every machine. PyTorch's float32 `exp` is not.
    """
    low, high = math.log(lowest), math.log(highest)
    return torch.tensor([math.exp(low + (high - low) * level / (levels - 1)) for level in range(levels)])
