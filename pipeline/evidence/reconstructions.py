"""Reconstructions side by side with error maps: the crop of each image with the largest errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps

from pipeline.data.pictures import read_image
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
    kept: list[dict[str, ImageResult]] = [
        {image.name: image for image in stage.record.evaluated.evaluation.images if _path(stage, image.name).is_file()}
        for stage in shown
    ]
    names = [name for name in kept[0] if all(name in other for other in kept)] if kept else []
    return [_compared_crop(name, [(stage, results[name]) for stage, results in zip(shown, kept, strict=True)])
            for name in names[:most]]  # fmt: skip


def _path(stage: StoredStage, image: str) -> Path:
    """The picture that holds an image and its reconstruction side by side."""
    return stage.folder / "reconstructions" / f"{comparison_name(image)}.png"


def _compared_crop(name: str, results: Sequence[tuple[StoredStage, ImageResult]]) -> ComparedCrop:
    pairs = [np.array_split(read_image(_path(stage, name)), 2, axis=1) for stage, _ in results]
    errors = [np.abs(x_hat.astype(float) - x).mean(axis=2) for x, x_hat in pairs]
    piece = _worst_piece(sum(errors[1:], errors[0]))
    renditions = [
        Rendition(stage.record.name, x_hat[piece], error_map(error[piece]), result)
        for (stage, result), (_, x_hat), error in zip(results, pairs, errors, strict=True)
    ]
    return ComparedCrop(name, pairs[0][0][piece], tuple(renditions))


def _worst_piece(errors: np.ndarray) -> tuple[slice, slice]:
    """The square of SIDE pixels with most error, on a grid of SIDE / 2 pixels. A smaller image is taken whole."""
    height, width = errors.shape
    tops, lefts = (range(0, max(side - SIDE, 0) + 1, SIDE // 2) for side in (height, width))
    places = [(slice(top, top + SIDE), slice(left, left + SIDE)) for top in tops for left in lefts]
    return max(places, key=lambda place: float(errors[place].sum()))


def error_map(errors: np.ndarray) -> np.ndarray:
    """Colors (H, W, 3), from black to yellow, for the mean absolute error of each pixel (H, W), of 255."""
    return (colormaps["inferno"](np.clip(errors / BRIGHTEST, 0, 1))[..., :3] * 255).astype(np.uint8)
