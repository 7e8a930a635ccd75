"""The Baseline's spatial priors: depth-wise residual blocks, steered by one adaptive vector a step."""

from collections.abc import Sequence

from torch import Tensor, nn

from modules.layers import DWConvRB


class SpatialPrior(nn.Module):
    """branch_2(branch_1(x) · q): the next step's scales and means from what is decoded so far."""

    def __init__(self, branch_1: Sequence[nn.Module], branch_2: Sequence[nn.Module], M: int):
        super().__init__()
        self.branch_1 = nn.Sequential(*branch_1)
        self.branch_2 = nn.Sequential(*branch_2, nn.Conv2d(3 * M, 2 * M, 1))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """Map x (B, 3M, H, W) and the step's vector q (1, 3M, 1, 1) to (B, 2M, H, W)."""
        return self.branch_2(self.branch_1(x) * q)


class DWConvSpatialPrior(SpatialPrior):
    """A spatial prior of DWConvRBs of 3M channels; `depths` counts them in branch_1 and branch_2."""

    def __init__(self, M: int, depths: tuple[int, int]):
        first, second = ([DWConvRB(3 * M) for _ in range(depth)] for depth in depths)
        super().__init__(first, second, M)
