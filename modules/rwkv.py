"""RWKV layers and the blocks made of them: attention of linear complexity over a whole image.

After Vision-RWKV (Duan et al., 2024) and Restore-RWKV (Yang et al., 2024), as LALIC (Feng et al., CVPR 2025) brought
them into image compression. Images stay (B, C, H, W) in channels-last memory, whose tokens (B, T = H·W, C) are a view.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.biwkv4 import biwkv4
from modules.components import Checkpointed
from modules.layers import Narrowable, depthwise, inner_width, pointwise_pair

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


class SpatialMix(Narrowable):
    """output(σ(r) ⊙ BiWKV4(decay/T, boost/T, k, v)), with k, v and r linear in the shifted input, `rate`·C wide."""

    def __init__(self, channels: int, rate: float = 1):
        super().__init__()
        width = inner_width(rate, channels)
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

    @property
    def last_linear(self) -> nn.Module:
        """`output`."""
        return self.output

    @torch.no_grad()
    def keep_channels(self, wider: Narrowable, index: Tensor) -> None:
        """Take over the shift and these channels of keys, values, receptances, decays and boosts."""
        assert isinstance(wider, SpatialMix)
        self.omni_shift.load_state_dict(wider.omni_shift.state_dict())
        for name in ("key", "value", "receptance"):
            getattr(self, name).weight.copy_(getattr(wider, name).weight[index])
        for name in ("decay", "boost"):
            getattr(self, name).copy_(getattr(wider, name)[index])


class ChannelMix(Narrowable):
    """σ(receptance(x̃)) ⊙ value(relu(key(x̃))²), x̃ the shifted input; the hidden width is `hidden_rate`·C."""

    def __init__(self, channels: int, hidden_rate: float):
        super().__init__()
        width = inner_width(hidden_rate, channels)
        self.omni_shift = OmniShift(channels)
        self.key = TokenLinear(channels, width)
        self.receptance = TokenLinear(channels, channels)
        self.value = TokenLinear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to its mixed tokens (B, H·W, C)."""
        return _by_parts(self._mix, _tokens(self.omni_shift(x)))

    def _mix(self, tokens: Tensor) -> Tensor:
        return torch.sigmoid(self.receptance(tokens)) * self.value(F.relu(self.key(tokens)).square())

    @property
    def last_linear(self) -> nn.Module:
        """`value`, whose output the receptance gates."""
        return self.value

    @torch.no_grad()
    def keep_channels(self, wider: Narrowable, index: Tensor) -> None:
        """Take over shift and receptance, and these channels of the keys."""
        assert isinstance(wider, ChannelMix)
        for name in ("omni_shift", "receptance"):
            getattr(self, name).load_state_dict(getattr(wider, name).state_dict())
        self.key.weight.copy_(wider.key.weight[index])


class RWKVBlock(Checkpointed):
    """x + γ₁ ⊙ ln1(spatial_mix(x)), then x + γ₂ ⊙ ln2(channel_mix(x)); with γ = 0 the identity.

    `hidden_rate` and `mix_rate`, by C, are the inner widths of the channel mix and of the spatial mix.
    """

    def __init__(self, channels: int, hidden_rate: float, mix_rate: float = 1):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.spatial_mix = SpatialMix(channels, mix_rate)
        self.channel_mix = ChannelMix(channels, hidden_rate)
        self.gamma1 = nn.Parameter(torch.ones(channels))
        self.gamma2 = nn.Parameter(torch.ones(channels))

    def _compute(self, x: Tensor) -> Tensor:
        x = x + _image(self.gamma1 * self.ln1(self.spatial_mix(x)), x)
        return x + _image(self.gamma2 * self.ln2(self.channel_mix(x)), x)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set γ to 0, so that the block hands its input through until training moves it."""
        self.gamma1.zero_()
        self.gamma2.zero_()


class RWKVConvBlock(Checkpointed):
    """x + γ₁ ⊙ ln1(spatial_mix(x)), then x + conv_mix(x), conv_mix being the branch of a DWConvRB.

    With γ₁ = 0 it is that DWConvRB. `hidden_rate` and `mix_rate`, by C, are the inner widths of the branch and of the
    spatial mix.
    """

    def __init__(self, channels: int, hidden_rate: float = 2, mix_rate: float = 1):
        super().__init__()
        self.ln1 = nn.LayerNorm(channels)
        self.spatial_mix = SpatialMix(channels, mix_rate)
        self.gamma1 = nn.Parameter(torch.ones(channels))
        self.conv_mix = pointwise_pair(depthwise(channels), channels, hidden_rate)

    def _compute(self, x: Tensor) -> Tensor:
        x = x + _image(self.gamma1 * self.ln1(self.spatial_mix(x)), x)
        return x + self.conv_mix(x)

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Set γ₁ to 0, so that the block is its convolutional branch until training moves it."""
        self.gamma1.zero_()
