"""The Baseline's fusion of a coarser scale's context with the hyper-prior: a 1×1 convolution."""

from dataclasses import dataclass

from torch import nn

from modules.context.components import Component, Kind, register


class PointwiseFusion(nn.Conv2d, Component):
    """A 1×1 convolution of 2M channels, (B, 2M, H, W) to the same shape."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 1)


@register("fusion", "conv")
@dataclass(frozen=True)
class ConvFusionKind(Kind):
    """The 1×1 convolution."""

    def build(self, M: int) -> PointwiseFusion:
        return PointwiseFusion(2 * M)
