"""Results of coding images, without PyTorch, so that records of them are read quickly."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.common.tables import number
from pipeline.weights.published import Quality


def cells(quality: Quality) -> tuple[str, ...]:
    """Rate, PSNR, MS-SSIM and loss as tables show them."""
    return number(quality.bpp), number(quality.psnr_db, ".2f"), number(quality.ms_ssim), number(quality.rd_loss)


def mean_quality(qualities: Sequence[Quality]) -> Quality:
    """The mean of each value over the images that have it."""
    names = dict.fromkeys(name for quality in qualities for name in quality.others)
    others = {name: _mean(quality.others.get(name) for quality in qualities) for name in names}
    return Quality(
        bpp=float(np.mean([quality.bpp for quality in qualities])),
        psnr_db=float(np.mean([quality.psnr_db for quality in qualities])),
        ms_ssim=_mean(quality.ms_ssim for quality in qualities),
        rd_loss=float(np.mean([quality.rd_loss for quality in qualities])),
        others={name: value for name, value in others.items() if value is not None},
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class ImageResult:
    """The result of coding one image; times in seconds. `estimated_bpp` is the rate that the likelihoods predict."""

    name: str
    quality: Quality
    estimated_bpp: float
    encode_seconds: float
    decode_seconds: float

    def to_compressai(self) -> dict[str, float | None]:
        """The values by CompressAI's names."""
        return {
            "psnr-rgb": self.quality.psnr_db,
            "ms-ssim-rgb": self.quality.ms_ssim,
            "bpp": self.quality.bpp,
            "encoding_time": self.encode_seconds,
            "decoding_time": self.decode_seconds,
        }


@dataclass(frozen=True)
class Evaluation:
    """Results per image and their mean."""

    images: tuple[ImageResult, ...]

    @property
    def quality(self) -> Quality:
        """The mean quality over images."""
        return mean_quality([image.quality for image in self.images])

    @property
    def mean(self) -> ImageResult:
        """The mean of every value over images."""
        names = ("estimated_bpp", "encode_seconds", "decode_seconds")
        means = {name: float(np.mean([getattr(image, name) for image in self.images])) for name in names}
        return ImageResult("mean", self.quality, **means)

    def to_json(self, name: str, *others: "Evaluation") -> dict[str, Any]:
        """All values in the layout of `compressai.utils.eval_model`, which CompressAI's plotting tool reads.

        `results` holds means as curves, in bits per pixel, dB, and seconds per image. They have one point, and one for
        each evaluation of the same codec at another rate.
        """
        means = [evaluation.mean.to_compressai() for evaluation in (self, *others)]
        return {
            "name": name,
            "description": "Inference (ans)",
            "results": {key: [mean[key] for mean in means] for key, value in means[0].items() if value is not None},
            "images": [
                {"source": image.name, "estimated_bpp": image.estimated_bpp, **image.to_compressai()}
                for evaluation in (self, *others)
                for image in evaluation.images
            ],
        }
