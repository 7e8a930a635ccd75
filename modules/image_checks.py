"""Checks that images have the right type, shape and range."""

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = -0.5, 4.0
"""Values beyond these show that an image is not scaled to [0, 1]. Resampled images exceed [0, 1] slightly."""


def check_form(images: Tensor, dtype: torch.dtype) -> None:
    """Check the type and shape of images for a codec with weights of `dtype`, without reading values.

    Raises TypeError unless they are a tensor of that type (of any floating type within autocast), and ValueError
    unless their shape is (B, 3, H, W).
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images should be a tensor (B, 3, H, W) with values in [0, 1], not {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}: convert them to values in [0, 1] with images.float() / 255")
    if images.dtype != dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images are {images.dtype}, the codec's weights {dtype}: convert them with images.to({dtype})")
    if images.dim() == 3 and images.shape[0] == 3:
        raise ValueError(f"images of shape {(*images.shape,)} lack the batch dimension: give images[None]")
    if images.dim() != 4 or images.shape[1] != 3:
        last = ": move the channels to the second place" if images.dim() in (3, 4) and images.shape[-1] == 3 else ""
        raise ValueError(f"images should have the shape (B, 3, H, W), not {(*images.shape,)}{last}")
    if 0 in images.shape:
        raise ValueError(f"images of shape {(*images.shape,)} have no pixels")


def check_range(images: Tensor) -> None:
    """Raise ValueError if the values are clearly not in [0, 1]. NaN and ±∞ pass. On a GPU this waits for the images."""
    low, high = (float(bound) for bound in torch.aminmax(images.detach()))
    if high > HIGHEST and math.isfinite(high):
        raise ValueError(f"images have values up to {high:.4g}: they should be in [0, 1]; divide 8-bit values by 255")
    if low < LOWEST and math.isfinite(low):
        raise ValueError(f"images have values down to {low:.4g}: they should be in [0, 1]; undo the normalization")
