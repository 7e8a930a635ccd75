"""The residual blocks of HPCM's convolutional parts (Li et al., ICCV 2025)."""

import torch
from torch import Tensor, nn

from modules.layers.blocks import Narrowable, inner_width


class PConv(nn.Module):
    """Partial convolution: 3×3 on the first quarter of the channels, identity on the rest (Chen et al., CVPR 2023)."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolved = channels // 4
        self.pconv = nn.Conv2d(self.convolved, self.convolved, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        first, rest = x.split((self.convolved, x.shape[1] - self.convolved), dim=1)
        return torch.cat((self.pconv(first), rest), dim=1)


class ResidualBranch(nn.Module):
    """x + branch(x): the branch is spatial mixing, then two 1×1 convolutions of inner width `hidden_rate`·C."""

    def __init__(self, spatial: nn.Module, channels: int, hidden_rate: float):
        super().__init__()
        self.branch = pointwise_pair(spatial, channels, hidden_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + self.branch(x)


def pointwise_pair(spatial: nn.Module, channels: int, hidden_rate: float) -> "InnerChannels":
    """Spatial mixing, 1×1 to `hidden_rate`·C channels, LeakyReLU, 1×1 back to C."""
    width = inner_width(hidden_rate, channels)
    return InnerChannels(
        spatial,
        nn.Conv2d(channels, width, 1),
        nn.LeakyReLU(0.01, inplace=True),
        nn.Conv2d(width, channels, 1),
    )


class InnerChannels(Narrowable, nn.Sequential):
    """The branch of a residual block: (spatial, 1×1, LeakyReLU, 1×1)."""

    whole, inner, last = ("0",), ("1.weight", "1.bias"), "3"


class PConvRB(ResidualBranch):
    """The residual block of the transforms: a partial convolution, then two 1×1s of inner width `hidden_rate`·C."""

    def __init__(self, channels: int, hidden_rate: float = 4):
        super().__init__(PConv(channels), channels, hidden_rate)


class DWConvRB(ResidualBranch):
    """The residual block of the Baseline priors: a depth-wise 3×3, then two 1×1s of inner width `hidden_rate`·C."""

    def __init__(self, channels: int, hidden_rate: float = 2):
        super().__init__(depthwise(channels), channels, hidden_rate)


def depthwise(channels: int) -> nn.Conv2d:
    """A depth-wise 3×3 convolution."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
