"""Metrics of a reconstruction: the reported values, the distortions that a stage can train on, and the R-D loss."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_msssim import ms_ssim
from torch import Tensor

from modules.plugins import note_registration
from pipeline.common.errors import UserError
from pipeline.recipes.registered import METRICS as TRAINABLE
from pipeline.weights.published import Quality

NamedImage = tuple[str, Tensor]
"""A name and an image (1, 3, H, W) in [0, 1]."""


class EvaluationError(UserError):
    """The loss is not defined for an image; the message names the image."""


@dataclass(frozen=True)
class Metric:
    """One metric of images and their reconstructions, both (B, 3, H, W) in [0, 1].

    `measure` returns a number for one image. `distortion` is optional: a differentiable mean over the batch. The loss
    is then λ · weight · distortion + bits per pixel.
    """

    name: str
    """Name in recipes, tables, MLflow and checkpoints."""
    heading: str
    """Heading of its column in tables, with the unit."""
    measure: Callable[[Tensor, Tensor], float]
    """(image, x_hat) → value; not called for images smaller than `minimum_side`."""
    form: str = ".4f"
    """Format of the value in tables."""
    distortion: Callable[[Tensor, Tensor], Tensor] | None = None
    """(x_hat, images) → scalar."""
    weight: float = 1.0
    minimum_side: int = 1
    """Minimum side of an image in pixels."""
    shown: Callable[[float], float] = lambda distortion: distortion
    """Maps the mean distortion in training to the logged value."""
    shown_as: str | None = None
    """Name of the logged value; by default the metric's name."""

    def of(self, image: Tensor, x_hat: Tensor) -> float | None:
        """The value for one image (1, 3, H, W); None if the image is too small."""
        return self.measure(image, x_hat) if min(image.shape[2:]) >= self.minimum_side else None


_METRICS: dict[str, Metric] = {}


def register_metric(metric: Metric) -> Metric:
    """Register a metric under its name; raises ValueError if the name is taken."""
    if metric.name in _METRICS or metric.name in ("bpp", "psnr_db", "ms_ssim", "rd_loss"):
        raise ValueError(f"the metric name {metric.name!r} is taken")
    _METRICS[metric.name] = metric
    note_registration(metric.name, metric.measure.__module__)
    if metric.distortion is not None:
        TRAINABLE[metric.name] = metric.minimum_side
    return metric


def metric_named(name: str) -> Metric:
    """The metric with this name."""
    return _METRICS[name]


def further_metrics() -> list[Metric]:
    """Registered metrics other than PSNR and MS-SSIM."""
    return [metric for metric in _METRICS.values() if metric not in (PSNR, MS_SSIM)]


def psnr_db(image: Tensor, x_hat: Tensor) -> float:
    """PSNR of values in [0, 1], in dB, at most 100."""
    return _psnr(float(_mse(x_hat.double(), image.double())))


def _psnr(mse: float) -> float:
    return -10 * float(np.log10(max(mse, 1e-10)))


def _mse(x_hat: Tensor, images: Tensor) -> Tensor:
    return (x_hat - images).square().mean()


def _dissimilarity(x_hat: Tensor, images: Tensor) -> Tensor:
    return 1 - ms_ssim(x_hat, images, data_range=1.0)


PSNR = register_metric(Metric("mse", "PSNR dB", psnr_db, ".2f", _mse, weight=255**2, shown=_psnr, shown_as="psnr_db"))
MS_SSIM = register_metric(
    Metric(
        "ms-ssim",
        "MS-SSIM",
        lambda image, x_hat: float(ms_ssim(x_hat, image, data_range=1.0)),
        distortion=_dissimilarity,
        minimum_side=TRAINABLE["ms-ssim"],
        shown=lambda distortion: 1 - distortion,
        shown_as="ms_ssim",
    )
)


def bits_per_pixel(likelihoods: dict[str, Tensor], pixels: int) -> Tensor:
    """Estimated rate in bits per pixel; `pixels` is the total of all images in `likelihoods`."""
    return sum((-likelihood.log2().sum() for likelihood in likelihoods.values()), torch.zeros(())) / pixels


def quality_of(named: NamedImage, x_hat: Tensor, bpp: float, lmbda: float, metric: str) -> Quality:
    """Compare an image with its reconstruction, both (1, 3, H, W); the reconstruction is clipped to [0, 1].

    Raises EvaluationError if the image is too small for the metric of the loss.
    """
    (name, image), x_hat = named, x_hat.clamp(0, 1)
    height, width = image.shape[2:]
    trained = metric_named(metric)
    if min(height, width) < trained.minimum_side:
        raise EvaluationError(
            f"{name}: {width}×{height} pixels; 'metric: {metric}' needs at least {trained.minimum_side} a side.\n"
            "  Take the image out of the validation images (data.val), or use 'metric: mse'."
        )
    assert trained.distortion is not None  # the recipe's schema checks it
    loss = bpp + lmbda * trained.weight * float(trained.distortion(x_hat.double(), image.double()))
    others = {other.name: other.of(image, x_hat) for other in further_metrics()}
    return Quality(
        bpp,
        PSNR.measure(image, x_hat),
        MS_SSIM.of(image, x_hat),
        loss,
        {name: value for name, value in others.items() if value is not None},
    )
