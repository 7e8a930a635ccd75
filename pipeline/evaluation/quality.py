"""Rate and distortion of an image, and the loss that they make."""

from collections.abc import Sequence

import numpy as np
import torch
from pytorch_msssim import ms_ssim
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.recipes.schema import MS_SSIM_MINIMUM
from pipeline.weights.published import Quality

NamedImage = tuple[str, Tensor]
"""A name and an image (1, 3, H, W) in [0, 1]."""


class EvaluationError(UserError):
    """An image that the loss is not defined for; the message names it."""


def bits_per_pixel(likelihoods: dict[str, Tensor], pixels: int) -> Tensor:
    """Estimated rate in bits per pixel; `likelihoods` of images that have `pixels` pixels together."""
    return sum((-likelihood.log2().sum() for likelihood in likelihoods.values()), torch.zeros(())) / pixels


def mean_quality(qualities: Sequence[Quality]) -> Quality:
    """The mean of each field; MS-SSIM over the images that have one."""
    similarities = [quality.ms_ssim for quality in qualities if quality.ms_ssim is not None]
    return Quality(
        bpp=float(np.mean([quality.bpp for quality in qualities])),
        psnr_db=float(np.mean([quality.psnr_db for quality in qualities])),
        ms_ssim=float(np.mean(similarities)) if similarities else None,
        rd_loss=float(np.mean([quality.rd_loss for quality in qualities])),
    )


def quality_of(named: NamedImage, x_hat: Tensor, bpp: float, lmbda: float, metric: str) -> Quality:
    """Compare an image with its reconstruction, both (1, 3, H, W), clipped to [0, 1].

    Raises EvaluationError for an image too small for the metric MS-SSIM.
    """
    (name, image), x_hat = named, x_hat.clamp(0, 1)
    height, width = image.shape[2:]
    similarity = float(ms_ssim(x_hat, image, data_range=1.0)) if min(height, width) >= MS_SSIM_MINIMUM else None
    if metric == "mse":
        distortion = 255**2 * _mse(image, x_hat)
    elif similarity is not None:
        distortion = 1 - similarity
    else:
        raise EvaluationError(
            f"{name}: {width}×{height} pixels; 'metric: ms-ssim' needs at least {MS_SSIM_MINIMUM} a side.\n"
            "  Take the image out of the validation images (data.val), or use 'metric: mse'."
        )
    return Quality(bpp, psnr_db(image, x_hat), similarity, bpp + lmbda * distortion)


def psnr_db(image: Tensor, x_hat: Tensor) -> float:
    """PSNR of values in [0, 1], 100 dB at most."""
    return -10 * float(np.log10(max(_mse(image, x_hat), 1e-10)))


def _mse(image: Tensor, x_hat: Tensor) -> float:
    return float((x_hat.double() - image.double()).square().mean())
