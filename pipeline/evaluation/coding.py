"""Measures a codec on whole images: estimated from likelihoods, or with real bitstreams."""

import re
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from modules import HPCM
from modules.refinement import GoOn
from pipeline.common.files import replacing, text_digest
from pipeline.evaluation.metrics import NamedImage, bits_per_pixel, quality_of
from pipeline.evaluation.results import Evaluation, ImageResult, mean_quality
from pipeline.weights.published import Quality


@torch.no_grad()
def estimate(model: HPCM, images: Iterable[NamedImage], lmbda: float, metric: str) -> Quality:
    """Mean quality from the model's likelihoods, without a bitstream. The model's mode does not change."""
    qualities = []
    for name, image in images:
        image = image.to(model.means_hyper.device)
        coded = model(image, training=False)
        bpp = float(bits_per_pixel(coded["likelihoods"], image.shape[2] * image.shape[3]))
        qualities.append(quality_of((name, image), coded["x_hat"], bpp, lmbda, metric))
    return mean_quality(qualities)


def evaluate(
    model: HPCM, images: Iterable[NamedImage], lmbda: float, metric: str, keep: int = 0
) -> tuple[Evaluation, list[Tensor]]:
    """Code all images with real bitstreams; returns results and the first `keep` reconstructions (1, 3, H, W)."""
    model.update(force=True)
    results: list[ImageResult] = []
    kept: list[Tensor] = []
    for named in images:
        result, x_hat = code(model, named, lmbda, metric)
        results.append(result)
        kept += [x_hat] if len(kept) < keep else []
    return Evaluation(tuple(results)), kept


@torch.no_grad()
def code(
    model: HPCM, named: NamedImage, lmbda: float, metric: str, effort: int = 0, go_on: GoOn = lambda *_: True
) -> tuple[ImageResult, Tensor]:
    """Encode and decode one image with a real bitstream; returns result and 8-bit reconstruction (1, 3, H, W).

    `effort` and `go_on` are those of `HPCM.compress`.
    """
    x = named[1].to(model.means_hyper.device)
    pixels = x.shape[2] * x.shape[3]
    estimated = float(bits_per_pixel(model(x, training=False, reconstruct=False)["likelihoods"], pixels))
    start = time.perf_counter()
    coded = model.compress(x, effort=effort, go_on=go_on)
    encoded = time.perf_counter()
    x_hat = model.decompress(**coded)["x_hat"].mul(255).round().div(255).cpu()
    decoded = time.perf_counter()
    bpp = 8 * sum(len(string) for strings in coded["strings"] for string in strings) / pixels
    quality = quality_of(named, x_hat, bpp, lmbda, metric)
    return ImageResult(named[0], quality, estimated, encoded - start, decoded - encoded), x_hat


def comparison_name(image: str) -> str:
    """The name of an image's saved reconstruction: `001` for `001.png`, and with a digest for all other names.

    So `a.png`, `a.jpg` and `b/a.png` are kept apart, and a long path fits into a file's name.
    """
    if re.fullmatch(r"[^/~]{1,60}\.png", image):
        return image.removesuffix(".png")
    return f"{PurePosixPath(image).stem[:40]}~{text_digest(image)[:12]}"


def save_comparison(path: Path, image: Tensor, x_hat: Tensor) -> None:
    """Write an image and its reconstruction, both (1, 3, H, W), side by side as a PNG."""
    both = torch.cat((image.cpu(), x_hat.cpu()), dim=3)[0].clamp(0, 1)
    with replacing(path) as partial:
        Image.fromarray((both * 255).round().byte().permute(1, 2, 0).numpy()).save(partial, "PNG")
