"""Reconstructions side by side with error maps: the crop of each image with the largest errors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from pipeline.evaluation.coding import comparison_name
from pipeline.tracking.records import ChainRecord, Records, StageRecord

SIDE = 256
"""Side of the crop in pixels."""
DARKEST = 32
"""Error (of 255) at which the error map reaches its brightest color."""


@dataclass(frozen=True)
class Rendition:
    """One codec's reconstruction of the crop, (H, W, 3) in 8 bits, its error map, and the whole image's figures."""

    stage: str
    pixels: np.ndarray
    errors: np.ndarray
    bpp: float
    psnr_db: float


@dataclass(frozen=True)
class ComparedCrop:
    """A crop of one image: the original and its renditions."""

    name: str
    original: np.ndarray
    renditions: tuple[Rendition, ...]


def compared_crops(records: Records, chain: ChainRecord, most: int = 3) -> list[ComparedCrop]:
    """The first `most` images whose reconstructions all shown stages kept."""
    stages = stages_to_show(chain)
    kept = [_kept(records, stage) for stage in stages]
    names = [name for name in kept[0] if all(name in other for other in kept)] if kept else []
    return [_compared_crop(records, name, stages) for name in names[:most]]


def stages_to_show(chain: ChainRecord) -> list[StageRecord]:
    """The Baseline and all stages that are no other stage's parent, such as the last phase and the last control."""
    parents = {stage.parent for stage in chain.published.values()}
    return [stage for name, stage in chain.published.items() if stage.parent is None or name not in parents]


def _kept(records: Records, stage: StageRecord) -> list[str]:
    return [Path(name).stem for name in records.artifact_names(stage.run_id, "reconstructions")]


def _compared_crop(records: Records, name: str, stages: Sequence[StageRecord]) -> ComparedCrop:
    pairs = [_pair(records.artifact(stage.run_id, f"reconstructions/{name}.png")) for stage in stages]
    original = pairs[0][0]
    errors = [np.abs(x_hat.astype(float) - x).mean(axis=2) for x, x_hat in pairs]
    piece = _worst_piece(sum(errors[1:], errors[0]))
    renditions = [
        Rendition(stage.name, x_hat[piece], error_map(error[piece]), *_figures(records, stage, name))
        for stage, (_, x_hat), error in zip(stages, pairs, errors, strict=True)
    ]
    return ComparedCrop(name, original[piece], tuple(renditions))


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
    return (colormaps["inferno"](np.clip(errors / DARKEST, 0, 1))[..., :3] * 255).astype(np.uint8)


def _figures(records: Records, stage: StageRecord, name: str) -> tuple[float, float]:
    evaluation = json.loads(records.artifact(stage.run_id, "evaluation.json").read_text())
    image = next(image for image in evaluation["images"] if comparison_name(image["source"]) == name)
    return image["bpp"], image["psnr-rgb"]
