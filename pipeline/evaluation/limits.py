"""Checks from an image's size, before any allocation, whether memory suffices to code it."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from modules import HPCM, HPCMConfig
from modules.context.coding_order import hierarchy
from modules.layers.transforms import SynthesisTransform
from pipeline.common.memory import too_large
from pipeline.data.pictures import DataError

GRID = 128
"""Smallest padding multiple of any codec, in pixels."""


def padded_pixels(height: int, width: int, multiple: int = GRID) -> int:
    """Number of pixels of an image after padding."""
    return -(-height // multiple) * -(-width // multiple) * multiple**2


def coding_bytes(config: HPCMConfig, pixels: int) -> int:
    """Upper estimate of the memory in bytes for encoding or decoding an image with `pixels` padded pixels.

    It counts three activations at half the image's size, ten at the latent's size, and the image twice, in float32.
    From four million pixels on, it exceeds the measured use (`base`: 200 to 280 bytes a pixel, `tiny`: 80 to 95).
    Smaller images need a few hundred MB more.
    """
    channels = 3 * config.widths[0] / 4 + 10 * config.M / 256 + 6
    return int(4 * channels * pixels)


def refining_bytes(config: HPCMConfig, pixels: int) -> int:
    """Upper estimate of the memory in bytes for refining the latent of an image with `pixels` padded pixels.

    The backward pass needs what layers keep, and half as much again for gradients. Up to one tile of g_s this is kept
    for all layers. Beyond that it is computed again: for one tile, and for one coding step of the whole image.
    """
    kept = _kept_bytes(config)
    always = kept.always * pixels
    if pixels <= (16 * SynthesisTransform.tile) ** 2:
        return int(always + 1.5 * pixels * (kept.synthesis + sum(kept.steps)))
    tile = (16 * (SynthesisTransform.tile + 2 * kept.halo)) ** 2
    return int(always + 1.5 * max(kept.synthesis * min(tile, pixels), max(kept.steps) * pixels))


class _KeptBytes(NamedTuple):
    """What layers keep for the backward pass, in bytes for each pixel of the image."""

    synthesis: float
    steps: tuple[float, ...]
    always: float
    """Inputs of all steps, h_s, likelihoods and eight float32 images: what is never computed again."""
    halo: int


@cache
def _kept_bytes(config: HPCMConfig) -> _KeptBytes:
    model = HPCM.on_meta(config).eval().requires_grad_(False)
    M, h, w = model.latent_shapes(1, 1)[0]
    N, pixels = config.N, 256 * h * w
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    def bytes_of(work: Callable[[], object]) -> float:
        storages: dict[int, UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights) / pixels

    steps = []
    for scale in hierarchy(h, w, torch.device("cpu")).scales:
        context, y_hat = (meta(1, channels, scale.height, scale.width) for channels in (2 * M, M))
        steps += [
            bytes_of(partial(model.predict, step, context, y_hat)) for step in scale.steps if step.adaptor is not None
        ]
    likelihoods = 3 * bytes_of(lambda: model.entropy_estimation(meta(1, M, h, w), meta(1, M, h, w)).log2())
    inputs = len(steps) * 4 * 3 * M / 256
    always = inputs + bytes_of(lambda: model.h_s(meta(1, N, h // 4, w // 4))) + likelihoods + 8 * 3 * 4
    synthesis = bytes_of(lambda: model.synthesized(meta(1, M, h, w), (16 * h, 16 * w)))
    return _KeptBytes(synthesis, tuple(steps), always, model.g_s.halo)


def check_size(model: HPCM, height: int, width: int, max_pixels: int | None = None, refined: bool = False) -> None:
    """Raise DataError for an image that has more than `max_pixels` with padding; for None, memory sets the limit."""
    pixels = padded_pixels(height, width, model.downsampling_factor)
    size = f"{width}×{height} pixels, {pixels:,} with padding"
    if max_pixels is not None:
        if pixels > max_pixels:
            raise DataError(f"{size}: more than --max-pixels {max_pixels}")
    elif reason := too_large((refining_bytes if refined else coding_bytes)(model.config, pixels)):
        raise DataError(f"{size}: {'refining' if refined else 'coding'} {reason}; --max-pixels {pixels} allows it")
