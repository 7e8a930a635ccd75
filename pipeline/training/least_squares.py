"""Linear layers solved by ridge regression, in closed form, from the mean and covariance of their inputs.

All sums are in float64, so that the result does not depend on the batch size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.layers.blocks import LinearLayer

RIDGE = 1e-6
"""Added to the diagonal of a covariance, as a fraction of the mean diagonal. A constant channel gets no weight."""


class Moments:
    """Mean and covariance of row vectors, added batch by batch."""

    def __init__(self, width: int):
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add (n, width) vectors."""
        rows = rows.detach().to("cpu", torch.float64)
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Mean vector, (width,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance matrix, (width, width)."""
        return self.products / self.count - torch.outer(self.mean, self.mean)


@dataclass(frozen=True)
class Solution:
    """A linear layer y ≈ weight · x + bias, (out, in) and (out,). `error` is its unexplained share of variance."""

    weight: Tensor
    bias: Tensor
    error: float


def choose_channels(weight: Tensor, covariance: Tensor, count: int) -> Tensor:
    """Indices of the `count` inputs that best predict weight · x, in increasing order. `weight` is (out, in).

    Greedy forward selection: each step chooses the input that explains most of the remaining variance of the output.
    `covariance` is the covariance of the inputs, (in, in).
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
    """The layer that best approximates weight · x + bias from only the inputs `index` (k,)."""
    weight, bias = weight.double(), bias.double()
    covariance, mean = moments.covariance, moments.mean
    own, cross = covariance[index][:, index], weight @ covariance[:, index]
    ridge = RIDGE * float(own.diagonal().mean()) + 1e-30
    part = torch.linalg.solve(own + ridge * torch.eye(len(own), dtype=torch.float64), cross.T).T
    total = float((weight @ covariance * weight).sum())
    missed = total - 2 * float((part * cross).sum()) + float((part @ own * part).sum())
    return Solution(part, bias + weight @ mean - part @ mean[index], max(0.0, missed) / max(total, 1e-30))


def solve_fit(moments: Moments, inputs: int) -> Solution:
    """The layer that predicts the rest of the vectors from their first `inputs` entries."""
    rest = torch.eye(len(moments.sum), dtype=torch.float64)[inputs:]
    return solve_part(rest, torch.zeros(len(rest)), moments, torch.arange(inputs))


def rows_of(x: Tensor, layer: LinearLayer) -> Tensor:
    """Input or output of a linear layer (B, T, C) or a 1×1 convolution (B, C, H, W), as rows (n, C)."""
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).flatten(0, -2)


@torch.no_grad()
def set_layer(layer: LinearLayer, solution: Solution) -> None:
    """Copy a solution into a linear layer or 1×1 convolution. A layer without bias ignores the solution's bias."""
    layer.weight.copy_(solution.weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(solution.bias)
