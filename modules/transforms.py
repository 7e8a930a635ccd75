"""Analysis and synthesis transforms, of the image and of the hyper-prior (HPCM, ICCV 2025, section 3)."""

from collections.abc import Sequence

from torch import Tensor, nn

from modules.layers import PConvRB


def _blocks(channels: int, depth: int) -> list[nn.Module]:
    return [PConvRB(channels) for _ in range(depth)]


class Transform(nn.Module):
    """A chain of layers under the name `branch`, as the published checkpoints call it."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        return self.branch(x)


class AnalysisTransform(Transform):
    """g_a: an image (B, 3, H, W) to the latent y (B, M, H/16, W/16)."""

    def __init__(self, M: int, widths: Sequence[int], depths: Sequence[int]):
        half, quarter, eighth = widths
        super().__init__(
            [
                nn.Conv2d(3, half, 4, stride=2, padding=1),
                *_blocks(half, depths[0]),
                nn.Conv2d(half, quarter, 2, stride=2),
                *_blocks(quarter, depths[1]),
                nn.Conv2d(quarter, eighth, 2, stride=2),
                *_blocks(eighth, depths[2]),
                nn.Conv2d(eighth, M, 2, stride=2),
            ]
        )


class SynthesisTransform(Transform):
    """g_s: the decoded latent ŷ (B, M, H/16, W/16) to an image (B, 3, H, W), not clipped."""

    def __init__(self, M: int, widths: Sequence[int], depths: Sequence[int]):
        half, quarter, eighth = widths
        super().__init__(
            [
                nn.ConvTranspose2d(M, eighth, 2, stride=2),
                *_blocks(eighth, depths[2]),
                nn.ConvTranspose2d(eighth, quarter, 2, stride=2),
                *_blocks(quarter, depths[1]),
                nn.ConvTranspose2d(quarter, half, 2, stride=2),
                *_blocks(half, depths[0]),
                nn.ConvTranspose2d(half, 3, 4, stride=2, padding=1),
            ]
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
