"""Linear layers solved in closed form: from the mean and covariance of their inputs, by ridge regression.

All sums are in float64, so that a result depends on the data and not on how they were divided into batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.layers import LinearLayer

RIDGE = 1e-6
"""Added to the diagonal of a covariance, as a share of its mean: a channel that never varies gets no weight."""


class Moments:
    """Mean and covariance of row vectors, taken in batch by batch."""

    def __init__(self, width: int):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in (n, width) vectors."""
        rows = rows.detach().to("cpu", torch.float64)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """(width,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(width, width)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Solution:
    """A linear layer y ≈ weight · x + bias, (out, in) and (out,), and the share of the target's variance it misses."""

    weight: Tensor
    bias: Tensor
    error: float


def choose_channels(weight: Tensor, covariance: Tensor, count: int) -> Tensor:
    """The `count` inputs from which weight · x, weight (out, in), is best predicted; in increasing order.

    Greedy forward selection: each choice removes most of the output's variance that the inputs chosen before leave
    unexplained. `covariance` (in, in) is that of the inputs.
    """
    weight, left = weight.double(), covariance.clone()
    floor = RIDGE * float(covariance.diagonal().mean()) + 1e-30
    chosen: list[int] = []
    available = torch.ones(len(left), dtype=torch.bool)
    for _ in range(count):
        variance = left.diagonal().clamp_min(floor)
        gain = (weight @ left).square().sum(0) / variance
        best = int(gain.masked_fill(~available, -1.0).argmax())
        chosen.append(best)
        available[best] = False
        column = left[:, best].clone()
        left = left - torch.outer(column, column) / (column[best] + floor)
    return torch.tensor(sorted(chosen))


def solve_part(weight: Tensor, bias: Tensor, moments: Moments, index: Tensor) -> Solution:
    """The layer that reads only the inputs `index` (k,) and comes closest to weight · x + bias."""
    weight, bias = weight.double(), bias.double()
    covariance, mean = moments.covariance, moments.mean
    cross = weight @ covariance[:, index]
    part = _ridge(covariance[index][:, index], cross)
    total = float((weight @ covariance * weight).sum())
    missed = total - 2 * float((part * cross).sum()) + float((part @ covariance[index][:, index] * part).sum())
    return Solution(part, bias + weight @ mean - part @ mean[index], max(0.0, missed) / max(total, 1e-30))


def solve_fit(moments: Moments, inputs: int) -> Solution:
    """The layer from the first `inputs` entries of the vectors to the rest."""
    covariance, mean = moments.covariance, moments.mean
    own, cross = covariance[:inputs, :inputs], covariance[inputs:, :inputs]
    weight = _ridge(own, cross)
    total = float(covariance[inputs:, inputs:].diagonal().sum())
    missed = total - 2 * float((weight * cross).sum()) + float((weight @ own * weight).sum())
    return Solution(weight, mean[inputs:] - weight @ mean[:inputs], max(0.0, missed) / max(total, 1e-30))


def _ridge(covariance: Tensor, cross: Tensor) -> Tensor:
    """cross · (covariance + ridge)⁻¹, (out, k)."""
    ridge = RIDGE * float(covariance.diagonal().mean()) + 1e-30
    return torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64), cross.T).T


def rows_of(x: Tensor, layer: LinearLayer) -> Tensor:
    """What a linear layer or 1×1 convolution reads or writes, (B, T, C) or (B, C, H, W), as rows (n, C)."""
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)


@torch.no_grad()
def set_layer(layer: LinearLayer, solution: Solution) -> None:
    """Give a linear layer or 1×1 convolution its solution; without a bias of its own, the bias is left out."""
    layer.weight.copy_(solution.weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(solution.bias)
