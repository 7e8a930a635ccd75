"""Reconstructions side by side with error maps: the crop of each image with the largest errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pipeline.evaluation.coding import comparison_name
from pipeline.evaluation.results import ImageResult
from pipeline.records.chains import ChainRecord, StoredStage

SIDE = 256
"""Side of the crop in pixels. A smaller image is shown whole."""
BRIGHTEST = 32
"""Error (of 255) at which the error map reaches its brightest color."""


@dataclass(frozen=True)
class Rendition:
    """One codec's reconstruction of the crop, (H, W, 3) in 8 bits, its error map, and the whole image's figures."""

    stage: str
    pixels: np.ndarray
    errors: np.ndarray
    result: ImageResult


@dataclass(frozen=True)
class ComparedCrop:
    """A crop of one image: the original and its renditions."""

    name: str
    original: np.ndarray
    renditions: tuple[Rendition, ...]


def compared_crops(chain: ChainRecord, most: int = 3) -> list[ComparedCrop]:
    """The first `most` images whose reconstructions all shown stages kept."""
    parents = {stage.record.parent for stage in chain.published.values()}
    # The root, and all stages that are no other stage's parent, such as the last phase and the last control.
    shown = [stage for name, stage in chain.published.items() if stage.record.parent is None or name not in parents]
    kept = [_kept(stage) for stage in shown]
    names = [name for name in kept[0] if all(name in other for other in kept)] if kept else []
    return [_compared_crop(name, [(stage, results[name]) for stage, results in zip(shown, kept, strict=True)])
            for name in names[:most]]  # fmt: skip


def _kept(stage: StoredStage) -> dict[str, ImageResult]:
    """The results of the images whose reconstructions the stage kept, by the image's name."""
    images = stage.record.evaluated.evaluation.images
    return {image.name: image for image in images if _path(stage, image.name).is_file()}


def _path(stage: StoredStage, image: str) -> Path:
    return stage.folder / "reconstructions" / f"{comparison_name(image)}.png"


def _compared_crop(name: str, results: Sequence[tuple[StoredStage, ImageResult]]) -> ComparedCrop:
    pairs = [_pair(_path(stage, name)) for stage, _ in results]
    errors = [np.abs(x_hat.astype(float) - x).mean(axis=2) for x, x_hat in pairs]
    piece = _worst_piece(sum(errors[1:], errors[0]))
    renditions = [
        Rendition(stage.record.name, x_hat[piece], error_map(error[piece]), result)
        for (stage, result), (_, x_hat), error in zip(results, pairs, errors, strict=True)
    ]
    return ComparedCrop(name, pairs[0][0][piece], tuple(renditions))


def _pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Original and reconstruction from the image that holds both side by side."""
    with Image.open(path) as picture:
        both = np.asarray(picture.convert("RGB"))
    middle = both.shape[1] // 2
    return both[:, :middle], both[:, middle:]


def _worst_piece(errors: np.ndarray) -> tuple[slice, slice]:
    """The square of SIDE pixels with most error, on a grid of SIDE / 2 pixels. A smaller image is taken whole."""
    height, width = errors.shape
    tops, lefts = (range(0, max(side - SIDE, 0) + 1, SIDE // 2) for side in (height, width))
    places = [(slice(top, top + SIDE), slice(left, left + SIDE)) for top in tops for left in lefts]
    return max(places, key=lambda place: float(errors[place].sum()))


def error_map(errors: np.ndarray) -> np.ndarray:
    """Colors (H, W, 3), from black to yellow, for the mean absolute error of each pixel (H, W), of 255."""
    return (colormaps["inferno"](np.clip(errors / BRIGHTEST, 0, 1))[..., :3] * 255).astype(np.uint8)
