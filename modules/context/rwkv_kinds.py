"""The RWKV kinds of each slot: context cell, fusion and spatial priors."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from modules.context.attention import CrossAttentionKind
from modules.context.components import Component, Kind, register
from modules.context.fusion import ConvFusionKind
from modules.context.priors import DWConvPriorKind, PriorKind, SpatialPrior
from modules.layers.blocks import LinearLayer
from modules.layers.rwkv import RWKVBlock, RWKVConvBlock

ChannelMixForm = Literal["rwkv", "conv"]


class RWKVComponent(Component):
    """A component made of RWKV blocks. It replaces the Baseline's attention or convolution."""

    def start_as_identity(self) -> None:
        """Make every block start as the identity, or as a DWConvRB if it has a convolutional branch."""
        for block in self.modules():
            if isinstance(block, RWKVBlock | RWKVConvBlock):
                block.start_as_identity()


class RWKVContextCell(RWKVComponent):
    """The context cell that replaces cross-attention: the next context from the prior's output x and the context h."""

    def __init__(self, channels: int, hidden_rate: float, mix_rate: float = 1):
        super().__init__()
        self.input_proj = nn.Conv2d(2 * channels, channels, 1)
        self.block = RWKVBlock(channels, hidden_rate, mix_rate)
        self.output_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Map x and h, both (B, C, H, W), to (B, C, H, W)."""
        return self.output_proj(self.block(self.input_proj(torch.cat((x, h), dim=1))))

    @property
    def last_linear(self) -> LinearLayer:
        return self.output_proj

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Start as x: the block and the output projection are the identity, and the input projection selects x."""
        super().start_as_identity()
        channels = self.input_proj.out_channels
        for projection in (self.input_proj, self.output_proj):
            for parameter in projection.parameters():
                nn.init.zeros_(parameter)
            projection.weight[:, :channels, 0, 0].fill_diagonal_(1)


class RWKVFusionNet(RWKVComponent):
    """The fusion that replaces the 1×1 convolution between two scales: RWKV blocks, then a 1×1."""

    def __init__(self, channels: int, num_blocks: int = 1, hidden_rate: float = 4, mix_rate: float = 1):
        super().__init__()
        self.blocks = nn.Sequential(*(RWKVBlock(channels, hidden_rate, mix_rate) for _ in range(num_blocks)))
        self.out_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.out_proj(self.blocks(x))

    @property
    def last_linear(self) -> LinearLayer:
        return self.out_proj


class RWKVSpatialPriorBlock(RWKVBlock):
    """The RWKV block of a spatial prior, on its 3M channels."""


class RWKVSpatialPrior(RWKVComponent, SpatialPrior):
    """branch_2(branch_1(x) · q), with RWKV blocks of 3M channels in both branches and a last 1×1 to 2M.

    `depths` are the numbers of blocks in branch_1 and branch_2. `channel_mix` selects the block: `rwkv` is
    RWKVSpatialPriorBlock, `conv` is RWKVConvBlock.
    """

    def __init__(
        self,
        M: int,
        depths: tuple[int, int],
        hidden_rate: float,
        mix_rate: float = 1,
        channel_mix: ChannelMixForm = "rwkv",
    ):
        block = RWKVSpatialPriorBlock if channel_mix == "rwkv" else RWKVConvBlock
        first, second = ([block(3 * M, hidden_rate, mix_rate) for _ in range(depth)] for depth in depths)
        super().__init__(first, second, M)


class RWKVSpatialPrior_S1_S2(RWKVSpatialPrior):
    """The prior of the two coarse scales: `num_rwkv_blocks` blocks in branch_1, one in branch_2."""

    def __init__(self, M: int, num_rwkv_blocks: int = 2, hidden_rate: float = 4):
        super().__init__(M, (num_rwkv_blocks, 1), hidden_rate)


class RWKVSpatialPrior_S3(RWKVSpatialPrior):
    """The prior of the finest scale: `num_rwkv_blocks` blocks in branch_1, two in branch_2."""

    def __init__(self, M: int, num_rwkv_blocks: int = 3, hidden_rate: float = 4):
        super().__init__(M, (num_rwkv_blocks, 2), hidden_rate)


@register("attention", "rwkv")
@dataclass(frozen=True)
class RWKVContextKind(Kind):
    """An RWKV block between two 1×1 convolutions."""

    hidden_rate: float = 4
    """Inner width of the channel mix, as a multiple of its channels."""
    mix_rate: float = 1
    """Inner width of the spatial mix, as a multiple of its channels."""

    def build(self, M: int) -> RWKVContextCell:
        return RWKVContextCell(2 * M, self.hidden_rate, self.mix_rate)

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        """From windowed cross-attention, the 1×1 that it applies to the prior's output."""
        if isinstance(predecessor, CrossAttentionKind):
            return {"conv_out": "output_proj"}
        return super().takes_over(predecessor)


@register("fusion", "rwkv")
@dataclass(frozen=True)
class RWKVFusionKind(Kind):
    """RWKV blocks before a 1×1 convolution."""

    blocks: int = 1
    hidden_rate: float = 4
    """Inner width of the channel mix, as a multiple of its channels."""
    mix_rate: float = 1
    """Inner width of the spatial mix, as a multiple of its channels."""

    def build(self, M: int) -> RWKVFusionNet:
        return RWKVFusionNet(2 * M, self.blocks, self.hidden_rate, self.mix_rate)

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        """From the 1×1 fusion, the 1×1."""
        if isinstance(predecessor, ConvFusionKind):
            return {"": "out_proj"}
        return super().takes_over(predecessor)

    @property
    def num_blocks(self) -> int:
        return self.blocks


@register("prior", "rwkv")
@dataclass(frozen=True)
class RWKVPriorKind(PriorKind):
    """RWKV blocks of 3M channels in both branches."""

    hidden_rate: float = 4
    """Inner width of the channel mix, as a multiple of its channels; 2 to match the Baseline's convolution."""
    mix_rate: float = 1
    """Inner width of the spatial mix, as a multiple of its channels."""
    channel_mix: ChannelMixForm = "rwkv"
    """`conv` puts the branch of the predecessor's DWConvRB after each spatial mix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channel_mix not in get_args(ChannelMixForm):
            raise ValueError(f"channel_mix = {self.channel_mix!r}: there are {', '.join(get_args(ChannelMixForm))}")

    def build(self, M: int) -> RWKVSpatialPrior:
        return RWKVSpatialPrior(M, (self.blocks, self.last_blocks), self.hidden_rate, self.mix_rate, self.channel_mix)

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        """The last 1×1 of any prior. Also the blocks of the same kind, or for `conv` the branches of DWConvRBs."""
        taken = super().takes_over(predecessor)
        if isinstance(predecessor, RWKVPriorKind) and predecessor.channel_mix == self.channel_mix:
            return {"branch_1": "branch_1", "branch_2.{i}.{part}": "branch_2.{i}.{part}"} | taken
        if isinstance(predecessor, DWConvPriorKind) and self.channel_mix == "conv":
            return {f"branch_{n}.{{i}}.branch": f"branch_{n}.{{i}}.conv_mix" for n in (1, 2)} | taken
        return taken
