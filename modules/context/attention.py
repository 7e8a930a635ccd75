"""Windowed cross-attention (HPCM, ICCV 2025), which the RWKV cells replace, and a cell without attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modules.context.components import Component, Kind, register


class PassThroughCell(Component):
    """No attention: the next context is the prior's output.

    It is a module of its own, so that a migration can record its inputs and outputs, and replace it.
    """

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Both (B, C, H, W); returns x."""
        return x


class CrossAttentionCell(Component):
    """softmax(q kᵀ/√d) v + conv_out(x) in non-overlapping windows: q comes from x, k and v from the context h.

    `window` is the side of a window in positions of the cell's grid. Height and width must be multiples of it.
    """

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.conv_q = nn.Conv2d(channels, channels, 1)
        self.conv_k = nn.Conv2d(channels, channels, 1)
        self.conv_v = nn.Conv2d(channels, channels, 1)
        self.conv_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Attend from x to h, both (B, C, H, W); returns (B, C, H, W)."""
        q, k, v = (self._windows(t) for t in (self.conv_q(x), self.conv_k(h), self.conv_v(h)))
        attended = rearrange(
            F.scaled_dot_product_attention(q, k, v),
            "(b rows columns) heads (i j) d -> b (rows i) (columns j) (heads d)",
            rows=x.shape[2] // self.window,
            columns=x.shape[3] // self.window,
            i=self.window,
        )
        return attended.permute(0, 3, 1, 2) + self.conv_out(x)

    def _windows(self, x: Tensor) -> Tensor:
        return rearrange(
            x,
            "b (heads d) (rows i) (columns j) -> (b rows columns) heads (i j) d",
            heads=self.heads,
            i=self.window,
            j=self.window,
        )


@register("attention", "cross-attention")
@dataclass(frozen=True)
class CrossAttentionKind(Kind):
    """Windowed cross-attention."""

    least: ClassVar = {"heads": 1, "window": 1}

    heads: int = 32
    window: int = 8
    """Side of a window in positions of the slot's grid."""

    def build(self, M: int) -> CrossAttentionCell:
        """Build the cell of 2M channels. Raises ValueError unless 2M is a multiple of `heads`."""
        if 2 * M % self.heads:
            raise ValueError(f"2M = {2 * M} channels cannot be split evenly into {self.heads} attention heads")
        return CrossAttentionCell(2 * M, self.heads, self.window)

    @property
    def grid_multiple(self) -> int:
        """The side of a window, because windows tile the grid."""
        return self.window


@register("attention", "none")
@dataclass(frozen=True)
class NoAttentionKind(Kind):
    """The prior's output is the next context (HPCM's PhiContext)."""

    def build(self, M: int) -> PassThroughCell:
        return PassThroughCell()
