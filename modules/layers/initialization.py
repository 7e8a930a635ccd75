"""Initialization for training from scratch: unit variance through all layers, and scales above their bound."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.layers.residual import InnerChannels

_DAMPED_RESIDUAL = 0.25
_DAMPED_HEAD = 0.3
_LATENT_GAIN = 4.0


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values. On the meta device it has none, and computing with it imports PyTorch's compiler."""
    return not tensor.is_meta


@torch.no_grad()
def initialize_convolutions(model: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 1/fan-in), set its bias to 0, and damp the end of residual branches.

    PyTorch's default loses two thirds of the variance in each layer, which costs a codec its first hundreds of steps.
    """
    for convolution in _convolutions(model):
        nn.init.normal_(convolution.weight, std=1 / math.sqrt(_fan_in(convolution)))
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    for module in model.modules():
        if isinstance(module, InnerChannels):
            _convolutions(module.last_linear)[0].weight.mul_(_DAMPED_RESIDUAL)


@torch.no_grad()
def center_scales(heads: Sequence[nn.Module], M: int) -> None:
    """Make each head of scales and means (2M channels) start near scale 1 and mean 0, where no gradient vanishes."""
    for head in heads:
        convolution = _convolutions(head)[-1]
        convolution.weight.mul_(_DAMPED_HEAD)
        assert convolution.bias is not None
        convolution.bias[:M] += 1


@torch.no_grad()
def spread_latent(g_a: nn.Module, g_s: nn.Module) -> None:
    """Make y several quantization steps wide, so that ŷ carries information from the start, and x_hat near mid-gray."""
    _convolutions(g_a)[0].weight.mul_(_LATENT_GAIN)
    last = _convolutions(g_s)[-1]
    last.weight.div_(2 * _LATENT_GAIN)
    assert last.bias is not None
    nn.init.constant_(last.bias, 0.5)


def _convolutions(module: nn.Module) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def _fan_in(convolution: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """Number of inputs that one output value sums, on average."""
    weight = convolution.weight
    if isinstance(convolution, nn.ConvTranspose2d):
        return weight.shape[0] * weight[0, 0].numel() / math.prod(convolution.stride)
    return weight[0].numel()
