"""The residual blocks of HPCM's convolutional parts (Li et al., ICCV 2025)."""

import torch
from torch import Tensor, nn


class PConv(nn.Module):
    """Partial convolution: 3×3 on the first quarter of the channels, the rest untouched (Chen et al., CVPR 2023)."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolved = channels // 4
        self.pconv = nn.Conv2d(self.convolved, self.convolved, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        first, rest = x.split((self.convolved, x.shape[1] - self.convolved), dim=1)
        return torch.cat((self.pconv(first), rest), dim=1)


class ResidualBranch(nn.Module):
    """x + branch(x), for (B, C, H, W); spatial mixing, then a 1×1 pair `expansion` times as wide."""

    def __init__(self, spatial: nn.Module, channels: int, expansion: int):
        super().__init__()
        self.branch = nn.Sequential(
            spatial,
            nn.Conv2d(channels, expansion * channels, 1),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv2d(expansion * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x + self.branch(x)


class PConvRB(ResidualBranch):
    """The residual block of the transforms: a partial convolution and a 1×1 pair of width 4C."""

    def __init__(self, channels: int):
        super().__init__(PConv(channels), channels, expansion=4)


class DWConvRB(ResidualBranch):
    """The residual block of the Baseline priors: a depth-wise 3×3 and a 1×1 pair of width 2C."""

    def __init__(self, channels: int):
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        super().__init__(depthwise, channels, expansion=2)
