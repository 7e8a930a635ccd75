"""RWKV components: linear-complexity replacements for HPCM's context modules.

After Vision-RWKV (Duan et al., 2024) and Restore-RWKV (Yang et al., 2024), as LALIC (Feng et al., CVPR 2025) brought
them into image compression. Images stay (B, C, H, W) in channels-last memory, whose tokens (B, T = H·W, C) are a view.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.biwkv4 import biwkv4
from modules.priors import SpatialPrior

_TOKENS_AT_ONCE = 4096
"""Layers that mix no positions run on so many at a time: of a large image, their inner tensors would be the peak."""


_CONVOLVED_FROM = 2**17
"""Values of the tokens from which a linear layer is computed as a convolution; fewer do not pay for its set-up."""


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _by_parts(mix: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """`mix` of tokens, each (B, T, C), which sees every position by itself, some positions at a time."""
    if tokens[0].shape[1] <= _TOKENS_AT_ONCE:
        return mix(*tokens)
    parts = zip(*(x.split(_TOKENS_AT_ONCE, dim=1) for x in tokens), strict=True)
    return torch.cat([mix(*part) for part in parts], dim=1)


def _width(rate: float, channels: int) -> int:
    return max(1, round(rate * channels))


class TokenLinear(nn.Linear):
    """A linear layer of tokens, (B, T, C) to (B, T, width), without bias.

    In float32 on a CPU it is computed as the 1×1 convolution that it is: oneDNN's took half as long as the matrix
    products of the libraries that PyTorch comes with, on an AMD processor with two threads.
    """

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, width)."""
        if tokens.device.type != "cpu" or tokens.dtype != torch.float32 or tokens.numel() < _CONVOLVED_FROM:
            return super().forward(tokens)
        image = tokens.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, self.weight[:, :, None, None]).squeeze(2).transpose(1, 2)


class OmniShift(nn.Module):
    """α₀·x + α₁·dw1×1(x) + α₂·dw3×3(x) + α₃·dw5×5(x), computed as the one 5×5 depth-wise kernel they sum to.

    The kernel is summed anew from the parameters at every call, in training as in evaluation: 25·C additions beside
    25·C·H·W, and nothing that could go stale.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.conv1x1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.conv5x5 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.alpha = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]) + 0.1 * torch.randn(4))

    def kernel(self) -> Tensor:
        """The equivalent depth-wise kernel, (C, 1, 5, 5)."""
        center = self.alpha[0] + self.alpha[1] * self.conv1x1.weight
        inner = self.alpha[2] * self.conv3x3.weight + F.pad(center, (1, 1, 1, 1))
        return self.alpha[3] * self.conv5x5.weight + F.pad(inner, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return F.conv2d(x, self.kernel(), padding=2, groups=self.channels)


class SpatialMix(nn.Module):
    """output(σ(r) ⊙ BiWKV4(decay/T, boost/T, k, v)), with k, v and r linear in the shifted input, `rate`·C wide."""

    def __init__(self, channels: int, rate: float = 1):
        super().__init__()
        width = _width(rate, channels)
        self.omni_shift = OmniShift(channels)
        self.key = TokenLinear(channels, width)
        self.value = TokenLinear(channels, width)
        self.receptance = TokenLinear(channels, width)
        self.output = TokenLinear(width, channels)
        # From attention over the whole image to about a sixteenth of it.
        self.decay = nn.Parameter(16 * torch.linspace(0, 1, width) ** 2)
        self.boost = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to its mixed tokens (B, H·W, C)."""
        tokens = _tokens(self.omni_shift(x))
        length = tokens.shape[1]
        attended = biwkv4(self.decay / length, self.boost / length, self.key(tokens), self.value(tokens))
        return _by_parts(self._gate, tokens, attended)

    def _gate(self, tokens: Tensor, attended: Tensor) -> Tensor:
        return self.output(torch.sigmoid(self.receptance(tokens)) * attended)


class ChannelMix(nn.Module):
    """σ(receptance(x̃)) ⊙ value(relu(key(x̃))²), x̃ the shifted input; the hidden width is `hidden_rate`·C."""

    def __init__(self, channels: int, hidden_rate: float):
        super().__init__()
        width = _width(hidden_rate, channels)
        self.omni_shift = OmniShift(channels)
        self.key = TokenLinear(channels, width)
        self.receptance = TokenLinear(channels, channels)
        self.value = TokenLinear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to its mixed tokens (B, H·W, C)."""
        return _by_parts(self._mix, _tokens(self.omni_shift(x)))

    def _mix(self, tokens: Tensor) -> Tensor:
        return torch.sigmoid(self.receptance(tokens)) * self.value(F.relu(self.key(tokens)).square())


class RWKVBlock(nn.Module):
    """x + γ₁ ⊙ ln1(spatial_mix(x)), then x + γ₂ ⊙ ln2(channel_mix(x)); with γ = 0 the identity.

    `hidden_rate` and `mix_rate`, by C, are the inner widths of the channel mix and of the spatial mix.
    `use_checkpoint` recomputes the block in the backward pass instead of keeping its activations.
    """

    use_checkpoint = False

    def __init__(self, channels: int, hidden_rate: float, mix_rate: float = 1):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.spatial_mix = SpatialMix(channels, mix_rate)
        self.channel_mix = ChannelMix(channels, hidden_rate)
        self.gamma1 = nn.Parameter(torch.ones(channels))
        self.gamma2 = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._mix, x, use_reentrant=False, preserve_rng_state=False)
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        x = x + _image(self.gamma1 * self.ln1(self.spatial_mix(x)), x)
        return x + _image(self.gamma2 * self.ln2(self.channel_mix(x)), x)


class RWKVSpatialPriorBlock(RWKVBlock):
    """The RWKV block of a spatial prior, on its 3M channels."""


class RWKVComponent(nn.Module):
    """A component made of RWKV blocks, in a place where the Baseline has a convolutional or attention one."""

    def _blocks(self) -> list[RWKVBlock]:
        return [module for module in self.modules() if isinstance(module, RWKVBlock)]

    @property
    def use_checkpoint(self) -> bool:
        """Whether the blocks recompute their activations in the backward pass; setting it sets every block."""
        return all(block.use_checkpoint for block in self._blocks())

    @use_checkpoint.setter
    def use_checkpoint(self, value: bool) -> None:
        for block in self._blocks():
            block.use_checkpoint = value

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set every γ to 0, so that each block hands its input through until training moves it."""
        for block in self._blocks():
            block.gamma1.zero_()
            block.gamma2.zero_()


class RWKVContextCell(RWKVComponent):
    """The cross-attention's successor: the next context from the prior's output x and the context h."""

    def __init__(self, channels: int, hidden_rate: float, mix_rate: float = 1):
        super().__init__()
        self.input_proj = nn.Conv2d(2 * channels, channels, 1)
        self.block = RWKVBlock(channels, hidden_rate, mix_rate)
        self.output_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Map x and h, both (B, C, H, W), to (B, C, H, W)."""
        return self.output_proj(self.block(self.input_proj(torch.cat((x, h), dim=1))))

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Start as output_proj(x): blocks as the identity, and an input projection that selects x."""
        super().start_as_identity()
        channels = self.input_proj.out_channels
        for parameter in self.input_proj.parameters():
            nn.init.zeros_(parameter)
        self.input_proj.weight[:, :channels, 0, 0].fill_diagonal_(1)


class RWKVFusionNet(RWKVComponent):
    """The 1×1 context fusion's successor between two scales: RWKV blocks, then the 1×1."""

    def __init__(self, channels: int, num_blocks: int = 1, hidden_rate: float = 4, mix_rate: float = 1):
        super().__init__()
        self.blocks = nn.Sequential(*(RWKVBlock(channels, hidden_rate, mix_rate) for _ in range(num_blocks)))
        self.out_proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return self.out_proj(self.blocks(x))


class RWKVSpatialPrior(RWKVComponent, SpatialPrior):
    """branch_2(branch_1(x) · q) of RWKV blocks of 3M channels, and the 1×1 to 2M.

    `depths` counts the blocks of branch_1 and branch_2.
    """

    def __init__(self, M: int, depths: tuple[int, int], hidden_rate: float, mix_rate: float = 1):
        first, second = (
            [RWKVSpatialPriorBlock(3 * M, hidden_rate, mix_rate) for _ in range(depth)] for depth in depths
        )
        super().__init__(first, second, M)


class RWKVSpatialPrior_S1_S2(RWKVSpatialPrior):
    """The prior of the two coarse scales: `num_rwkv_blocks` blocks in branch_1, `num_last_blocks` in branch_2."""

    def __init__(
        self,
        M: int,
        num_rwkv_blocks: int = 2,
        hidden_rate: float = 4,
        num_last_blocks: int = 1,
        mix_rate: float = 1,
    ):
        super().__init__(M, (num_rwkv_blocks, num_last_blocks), hidden_rate, mix_rate)


class RWKVSpatialPrior_S3(RWKVSpatialPrior):
    """The prior of the finest scale: `num_rwkv_blocks` blocks in branch_1, `num_last_blocks` in branch_2."""

    def __init__(
        self,
        M: int,
        num_rwkv_blocks: int = 3,
        hidden_rate: float = 4,
        num_last_blocks: int = 2,
        mix_rate: float = 1,
    ):
        super().__init__(M, (num_rwkv_blocks, num_last_blocks), hidden_rate, mix_rate)
