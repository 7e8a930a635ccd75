"""RWKV layers and blocks: attention over a whole image in linear time.

They follow Vision-RWKV (Duan et al., 2024) and Restore-RWKV (Yang et al., 2024), which LALIC (Feng et al., CVPR 2025)
brought into image compression. Images are (B, C, H, W) in channels-last memory. Their tokens (B, T = H·W, C) are a
view.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.biwkv4.op import biwkv4
from modules.layers.blocks import Checkpointed, Narrowable, inner_width
from modules.layers.initialization import has_values
from modules.layers.residual import depthwise, pointwise_pair

_TOKENS_AT_ONCE = 4096
"""Layers that do not mix positions process this many at a time, which bounds the memory of their inner tensors."""


_CONVOLVED_FROM = 2**17
"""A linear layer of at least this many input values is computed as a convolution. For fewer the set-up costs more."""


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _by_parts(mix: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """Apply `mix`, which treats each position separately, to tokens (B, T, C), some positions at a time."""
    if torch.compiler.is_exporting() or tokens[0].shape[1] <= _TOKENS_AT_ONCE:  # An exported graph fits every length.
        return mix(*tokens)
    parts = zip(*(x.split(_TOKENS_AT_ONCE, dim=1) for x in tokens), strict=True)
    return torch.cat([mix(*part) for part in parts], dim=1)


class TokenLinear(nn.Linear):
    """A linear layer without bias on tokens, (B, T, C) to (B, T, width).

    In float32 on a CPU it is computed as a 1×1 convolution. With two threads of an AMD processor, oneDNN's convolution
    took half as long as the matrix product of PyTorch's libraries.
    """

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, width)."""
        if torch.compiler.is_exporting() or tokens.device.type != "cpu" or tokens.dtype != torch.float32:
            return super().forward(tokens)
        if tokens.numel() < _CONVOLVED_FROM:
            return super().forward(tokens)
        image = tokens.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, self.weight[:, :, None, None]).squeeze(2).transpose(1, 2)


class OmniShift(nn.Module):
    """α₀·x + α₁·dw1×1(x) + α₂·dw3×3(x) + α₃·dw5×5(x), computed as one depth-wise 5×5 convolution.

    Every call sums the kernel from the parameters, in training and in evaluation. The sum takes 25·C additions, the
    convolution 25·C·H·W, and no cached kernel can be out of date.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.conv1x1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.conv5x5 = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.alpha = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        if has_values(self.alpha):
            self.alpha.data += 0.1 * torch.randn(4)

    def kernel(self) -> Tensor:
        """The equivalent depth-wise kernel, (C, 1, 5, 5)."""
        center = self.alpha[0] + self.alpha[1] * self.conv1x1.weight
        inner = self.alpha[2] * self.conv3x3.weight + F.pad(center, (1, 1, 1, 1))
        return self.alpha[3] * self.conv5x5.weight + F.pad(inner, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return F.conv2d(x, self.kernel(), padding=2, groups=self.channels)


class SpatialMix(Narrowable):
    """output(σ(r) ⊙ BiWKV4(decay/T, boost/T, k, v)); r, k and v are linear in the shifted input, of width `rate`·C."""

    whole = ("omni_shift",)
    inner = ("key.weight", "value.weight", "receptance.weight", "decay", "boost")
    last = "output"

    def __init__(self, channels: int, rate: float = 1):
        super().__init__()
        width = inner_width(rate, channels)
        self.omni_shift = OmniShift(channels)
        self.key = TokenLinear(channels, width)
        self.value = TokenLinear(channels, width)
        self.receptance = TokenLinear(channels, width)
        self.output = TokenLinear(width, channels)
        # The channels' ranges run from the whole image down to about a sixteenth of it.
        self.decay = nn.Parameter(torch.empty(width))
        if has_values(self.decay):
            self.decay.data = 16 * torch.linspace(0, 1, width) ** 2
        self.boost = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to its mixed tokens (B, H·W, C)."""
        tokens = _tokens(self.omni_shift(x))
        length = tokens.shape[1]
        attended = biwkv4(self.decay / length, self.boost / length, self.key(tokens), self.value(tokens))
        return _by_parts(self._gate, tokens, attended)

    def _gate(self, tokens: Tensor, attended: Tensor) -> Tensor:
        return self.output(torch.sigmoid(self.receptance(tokens)) * attended)


class ChannelMix(Narrowable):
    """σ(receptance(x̃)) ⊙ value(relu(key(x̃))²) of the shifted input x̃. The hidden width is `hidden_rate`·C."""

    whole, inner, last = ("omni_shift", "receptance"), ("key.weight",), "value"

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


class RWKVBlock(Checkpointed):
    """x + γ₁ ⊙ ln1(spatial_mix(x)), then x + γ₂ ⊙ ln2(channel_mix(x)). With γ = 0 it is the identity.

    The inner widths of the channel mix and the spatial mix are `hidden_rate`·C and `mix_rate`·C.
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
        """Set γ₁ and γ₂ to 0, so that the block starts as the identity."""
        self.gamma1.zero_()
        self.gamma2.zero_()


class RWKVConvBlock(Checkpointed):
    """x + γ₁ ⊙ ln1(spatial_mix(x)), then x + conv_mix(x). conv_mix is the branch of a DWConvRB.

    With γ₁ = 0 the block is that DWConvRB. The inner widths of the branch and the spatial mix are `hidden_rate`·C and
    `mix_rate`·C.
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
        """Set γ₁ to 0, so that the block starts as a DWConvRB."""
        self.gamma1.zero_()
