"""JPEG, WebP and AVIF by Pillow, to compare them with our codecs at equal file sizes."""

import io
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image, features

from pipeline.common.errors import UserError
from pipeline.evaluation.metrics import NamedImage, quality_of
from pipeline.weights.published import Quality

QUALITIES = range(101)


@dataclass(frozen=True)
class PillowCodec:
    """A codec of Pillow. Its options are the same at every quality."""

    title: str
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    feature: str | None = None
    """The feature of Pillow that the codec needs and that may be missing; None if the codec is always there."""

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """The bytes of a file at a quality from 0 to 100."""
        file = io.BytesIO()
        image.save(file, self.format, quality=quality, **self.options)
        return file.getvalue()


CODECS = {
    "jpeg": PillowCodec("JPEG", "JPEG", {"optimize": True, "progressive": True}),
    "webp": PillowCodec("WebP", "WEBP", {"method": 6}, "webp"),
    "avif": PillowCodec("AVIF", "AVIF", {"speed": 6}, "avif"),
}
"""The codecs by name. The options give small files. The chroma subsampling is each codec's default."""


def codecs_named(names: Iterable[str]) -> list[PillowCodec]:
    """The codecs with these names, such as `jpeg` and `avif`. Raises UserError if one is unknown or Pillow lacks it."""
    chosen = []
    for name in dict.fromkeys(map(str.lower, names)):
        if name not in CODECS:
            raise UserError(f"--against: there is no codec '{name}'; expected some of {','.join(CODECS)}")
        codec = CODECS[name]
        if codec.feature and not features.check(codec.feature):
            raise UserError(
                f"--against: Pillow {PIL.__version__} does not support {codec.title}. Upgrade it "
                f"(pip install --upgrade pillow), or leave {name} out of --against"
            )
        chosen.append(codec)
    return chosen


class PillowFiles:
    """The files of one image, (1, 3, H, W) in [0, 1], by one codec. Each quality is encoded only once."""

    def __init__(self, codec: PillowCodec, named: NamedImage):
        self.named = named
        pixels = named[1][0].permute(1, 2, 0).mul(255).round().byte().cpu().numpy()
        self.file = cache(partial(codec.encode, Image.fromarray(np.ascontiguousarray(pixels))))
        """The bytes at a quality from 0 to 100."""

    def measure(self, quality: int) -> Quality:
        """Bits per pixel of the whole file, PSNR and MS-SSIM at a quality."""
        data = self.file(quality)
        height, width = self.named[1].shape[2:]
        with Image.open(io.BytesIO(data)) as opened:
            pixels = np.array(opened.convert("RGB"))
        x_hat = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(torch.float32) / 255
        return quality_of((self.named[0], self.named[1].cpu()), x_hat, 8 * len(data) / (height * width), 0.0, "mse")

    def nearest(self, size: int) -> int:
        """The quality whose file size is nearest to `size` bytes."""
        return nearest_quality(lambda quality: len(self.file(quality)), size)


def nearest_quality(size_of: Callable[[int], int], size: int) -> int:
    """The quality whose file size is nearest to `size`, by bisection, because sizes grow with the quality."""
    above = bisect_left(QUALITIES, size, key=size_of)
    return min(
        (quality for quality in (above - 1, above) if quality in QUALITIES), key=lambda q: abs(size_of(q) - size)
    )
