"""The analysis and synthesis transforms of image and hyper-prior (HPCM, ICCV 2025, section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.layers.residual import PConvRB

Changes = Sequence[tuple[Tensor, Tensor]]
"""For each layer of a transform, a scale and a shift of its output, both (B or 1, C, 1, 1)."""


def _blocks(channels: int, depth: int, hidden_rate: float = 4) -> list[nn.Module]:
    return [PConvRB(channels, hidden_rate) for _ in range(depth)]


class Transform(nn.Module):
    """A sequence of layers, named `branch` as in the published checkpoints."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor, changes: Changes | None = None) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W'). `changes` adapt the output of each layer."""
        if changes is None:
            return self.branch(x)
        for layer, (scale, shift) in zip(self.branch, changes, strict=True):
            x = layer(x)
            x = torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))
        return x

    @property
    def layer_channels(self) -> list[int]:
        """The number of output channels of each layer."""
        channels: list[int] = []
        for layer in self.branch:
            channels.append(getattr(layer, "out_channels", 0) or channels[-1])  # A residual block keeps the channels.
        return channels


class ImageTransform(Transform):
    """A transform between image and latent. It works in tiles, so that its layers' memory is bounded for any image.

    Each tile is computed with a border as wide as the layers' receptive field, so the tiles together equal the
    transform of the whole image except for rounding. `units` are the sides of a latent position in the input and in
    the output, in pixels or positions.
    """

    tile = 64
    """Side of a tile in latent positions (64 are 1024 pixels)."""

    def __init__(self, layers: Sequence[nn.Module], units: tuple[int, int], depths: Sequence[int]):
        super().__init__(layers)
        self.units = units
        reach = 2 + sum(depth << level for level, depth in enumerate(depths, start=1))
        self.halo = -(-reach // 16)

    def forward(self, x: Tensor, changes: Changes | None = None) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W'). `changes` adapt the output of each layer."""
        height, width = (size // self.units[0] for size in x.shape[2:])
        if max(height, width) <= self.tile:
            return super().forward(x, changes)
        tops, lefts = (range(0, size, self.tile) for size in (height, width))
        rows = [torch.cat([self._tile(x, changes, top, left) for left in lefts], dim=3) for top in tops]
        return torch.cat(rows, dim=2)

    def _tile(self, x: Tensor, changes: Changes | None, top: int, left: int) -> Tensor:
        outer = [slice(max(first - self.halo, 0), first + self.tile + self.halo) for first in (top, left)]
        inner = [
            slice(first - around.start, first - around.start + self.tile)
            for first, around in zip((top, left), outer, strict=True)
        ]
        rows, columns = (slice(s.start * self.units[0], s.stop * self.units[0]) for s in outer)
        piece = x[:, :, rows, columns].contiguous(memory_format=torch.channels_last)
        if piece.requires_grad:  # Of all tiles together, the backward pass would need too much memory.
            y = checkpoint(super().forward, piece, changes, use_reentrant=False, preserve_rng_state=False)
        else:
            y = super().forward(piece, changes)
        rows, columns = (slice(s.start * self.units[1], s.stop * self.units[1]) for s in inner)
        return y[:, :, rows, columns]


class AnalysisTransform(ImageTransform):
    """g_a: an image (B, 3, H, W) to the latent y (B, M, H/16, W/16)."""

    def __init__(self, M: int, widths: Sequence[int], depths: Sequence[int], hidden_rate: float = 4):
        half, quarter, eighth = widths
        super().__init__(
            [
                nn.Conv2d(3, half, 4, stride=2, padding=1),
                *_blocks(half, depths[0], hidden_rate),
                nn.Conv2d(half, quarter, 2, stride=2),
                *_blocks(quarter, depths[1], hidden_rate),
                nn.Conv2d(quarter, eighth, 2, stride=2),
                *_blocks(eighth, depths[2], hidden_rate),
                nn.Conv2d(eighth, M, 2, stride=2),
            ],
            (16, 1),
            depths,
        )


class SynthesisTransform(ImageTransform):
    """g_s: the decoded latent ŷ (B, M, H/16, W/16) to an image (B, 3, H, W), not clipped."""

    def __init__(self, M: int, widths: Sequence[int], depths: Sequence[int], hidden_rate: float = 4):
        half, quarter, eighth = widths
        super().__init__(
            [
                nn.ConvTranspose2d(M, eighth, 2, stride=2),
                *_blocks(eighth, depths[2], hidden_rate),
                nn.ConvTranspose2d(eighth, quarter, 2, stride=2),
                *_blocks(quarter, depths[1], hidden_rate),
                nn.ConvTranspose2d(quarter, half, 2, stride=2),
                *_blocks(half, depths[0], hidden_rate),
                nn.ConvTranspose2d(half, 3, 4, stride=2, padding=1),
            ],
            (1, 16),
            depths,
        )


class HyperAnalysis(Transform):
    """h_a: the latent y (B, M, h, w) to the hyper-latent z (B, N, h/4, w/4)."""

    def __init__(self, M: int, N: int):
        super().__init__(
            [
                PConvRB(M),
                nn.Conv2d(M, N, 2, stride=2),
                *_blocks(N, 3),
                nn.Conv2d(N, N, 2, stride=2),
            ]
        )


class HyperSynthesis(Transform):
    """h_s: the decoded hyper-latent ẑ (B, N, h/4, w/4) to scales and means of y, (B, 2M, h, w)."""

    def __init__(self, M: int, N: int):
        super().__init__(
            [
                nn.ConvTranspose2d(N, N, 2, stride=2),
                *_blocks(N, 3),
                nn.ConvTranspose2d(N, 2 * M, 2, stride=2),
                PConvRB(2 * M),
            ]
        )
