"""Counts the multiplications of a codec."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import modules.biwkv4.flops  # noqa: F401 (registers the count of Bi-WKV4)
from modules import HPCM, HPCMConfig


def macs_per_pixel(config: HPCMConfig, height: int = 512, width: int = 768) -> float:
    """Multiply-accumulates per pixel of encoding and decoding one image, counted by PyTorch.

    The count includes convolutions, matrix products and attention, but no elementwise operations.
    """
    model = HPCM.on_meta(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2 / (height * width)
