"""Windowed cross-attention, the context component that the RWKV cells replace (HPCM, ICCV 2025), and its absence."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PassThroughCell(nn.Module):
    """No attention: the new context is the prior's output. A module, so that a migration can watch and replace it."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Both (B, C, H, W); returns x."""
        return x


class CrossAttentionCell(nn.Module):
    """softmax(q kᵀ/√d) v + conv_out(x) in non-overlapping windows: q from the new context, k and v from the old.

    `window` is the side of a tile on the grid that the cell works on; height and width must divide by it.
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
