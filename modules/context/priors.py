"""The Baseline's spatial priors: depth-wise residual blocks, scaled by one learned vector per step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from modules.context.components import Component, Kind, register
from modules.layers.blocks import LinearLayer
from modules.layers.residual import DWConvRB


class SpatialPrior(Component):
    """branch_2(branch_1(x) · q): the next step's scales and means from the context and the latent decoded so far."""

    def __init__(self, branch_1: Sequence[nn.Module], branch_2: Sequence[nn.Module], M: int):
        super().__init__()
        self.branch_1 = nn.Sequential(*branch_1)
        self.branch_2 = nn.Sequential(*branch_2, nn.Conv2d(3 * M, 2 * M, 1))

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """Map x (B, 3M, H, W) and the step's vector q (1, 3M, 1, 1) to (B, 2M, H, W)."""
        return self.branch_2(self.branch_1(x) * q)

    @property
    def last_linear(self) -> LinearLayer:
        """The 1×1 to scales and means."""
        last = self.branch_2[-1]
        assert isinstance(last, nn.Conv2d)
        return last


@dataclass(frozen=True)
class PriorKind(Kind):
    """A spatial prior made of equal blocks."""

    blocks: int = 3
    """Number of blocks in branch_1."""
    last_blocks: int = 2
    """Number of blocks in branch_2, before its 1×1."""

    @property
    def num_blocks(self) -> int:
        return self.blocks + self.last_blocks

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        """The last 1×1 of any prior, whatever its blocks."""
        if not isinstance(predecessor, PriorKind):
            return {}
        return {f"branch_2.{predecessor.last_blocks}": f"branch_2.{self.last_blocks}"}


@register("prior", "dwconv")
@dataclass(frozen=True)
class DWConvPriorKind(PriorKind):
    """DWConvRBs of 3M channels."""

    hidden_rate: float = 2
    """Inner width of a block, as a multiple of its channels."""

    def build(self, M: int) -> SpatialPrior:
        first, second = (
            [DWConvRB(3 * M, self.hidden_rate) for _ in range(count)] for count in (self.blocks, self.last_blocks)
        )
        return DWConvSpatialPrior(first, second, M)

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        """The last 1×1 of any prior. From a prior of the same kind, the blocks as well."""
        ending = super().takes_over(predecessor)
        if not isinstance(predecessor, DWConvPriorKind):
            return ending
        return {"branch_1": "branch_1", "branch_2.{i}.branch": "branch_2.{i}.branch", **ending}


class DWConvSpatialPrior(SpatialPrior):
    """A spatial prior of DWConvRBs of 3M channels."""
