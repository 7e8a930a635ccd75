"""Rate, distortion and rate–distortion loss of an image."""

import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.evaluation.metrics import MS_SSIM, PSNR, further_metrics, metric_named
from pipeline.weights.published import Quality

NamedImage = tuple[str, Tensor]
"""A name and an image (1, 3, H, W) in [0, 1]."""


class EvaluationError(UserError):
    """The loss is not defined for an image; the message names the image."""


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
