"""Rate–distortion curves of published stages, and the Bjøntegaard deltas between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from pipeline.common.tables import Table, number, shortest
from pipeline.evaluation.rd_curves import bd_psnr, bd_rate, bd_rate_ms_ssim, is_kodak
from pipeline.evaluation.results import cells, mean_quality
from pipeline.records.chains import ChainRecord
from pipeline.weights.published import Quality

NO_CONTROL = "no stage has a control: one with the root's codec, trained for as many steps and on the same images"


@dataclass(frozen=True)
class Point:
    """One λ of a curve: mean quality over `seeds` seeds."""

    lmbda: float
    quality: Quality
    seeds: int


Curve = list[Point]


class Delta(NamedTuple):
    """A curve against another over the `points` λ that both have. Deltas are None without an overlap."""

    points: int
    bd_rate: float | None
    """Per cent of rate at equal PSNR; negative means a lower rate."""
    bd_psnr: float | None
    """dB at equal rate."""
    bd_rate_ms_ssim: float | None
    """Per cent of rate at equal MS-SSIM."""


def curves(chains: Iterable[ChainRecord]) -> dict[str, Curve]:
    """The curve of every stage that these chains published, lowest λ first; parents before children.

    Only seeds that all λ have are averaged, because others would put kinks into the curve. If no seed is shared, all
    are averaged.
    """
    found: dict[str, dict[float, dict[int, Quality]]] = {}
    for chain in chains:
        for name, stage in chain.published.items():
            result = stage.record.evaluated
            points = {rate.lmbda: rate.quality for rate in result.rates} or {chain.lmbda: result.quality}
            for lmbda, quality in points.items():
                found.setdefault(name, {}).setdefault(lmbda, {})[chain.seed] = quality
    return {name: _curve(points) for name, points in found.items()}


def _curve(points: Mapping[float, Mapping[int, Quality]]) -> Curve:
    """A curve from qualities by λ and seed."""
    shared = set.intersection(*(set(seeds) for seeds in points.values()))
    chosen = {
        lmbda: [quality for seed, quality in seeds.items() if seed in shared or not shared]
        for lmbda, seeds in points.items()
    }
    return [Point(lmbda, mean_quality(chosen[lmbda]), len(chosen[lmbda])) for lmbda in sorted(chosen)]


def controls(chains: Iterable[ChainRecord]) -> dict[str, str]:
    """The control of every stage that has one; for a stage of several rates its parent, which has one rate."""
    found = {
        name: stage.record.parent if stage.record.evaluated.rates else chain.control(name)
        for chain in chains
        for name, stage in chain.published.items()
    }
    return {name: control for name, control in found.items() if control is not None}


def delta(curve: Curve, reference: Curve, reference_name: str) -> Delta:
    """Compare two curves at the λ that both have; raises ValueError for fewer than two λ."""
    shared = {point.lmbda for point in curve} & {point.lmbda for point in reference}
    if len(shared) < 2:
        raise ValueError(f"{len(shared)} λ in common with {reference_name}; a curve needs two or more")
    ours, theirs = ([point.quality for point in points if point.lmbda in shared] for points in (curve, reference))
    return Delta(len(shared), bd_rate(ours, theirs), bd_psnr(ours, theirs), bd_rate_ms_ssim(ours, theirs))


def slope(curve: Curve, lmbda: float) -> float | None:
    """Slope at one of the curve's λ in dB per (bit per pixel); None for one point or a curve that is not monotone."""
    rates = [point.quality.bpp for point in curve]
    psnr = [point.quality.psnr_db for point in curve]
    if len(curve) < 2 or np.any(np.diff(rates) <= 0) or np.any(np.diff(psnr) <= 0):
        return None
    at = next(point.quality.bpp for point in curve if point.lmbda == lmbda)
    return float(PchipInterpolator(rates, psnr).derivative()(at)) or None


def points_table(title: str, found: Mapping[str, Curve]) -> Table:
    """A table of all points of all curves."""
    table = Table(title, ("stage", "λ", "seeds", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss"))
    for name, curve in found.items():
        for point in curve:
            table.add(name, shortest(point.lmbda), str(point.seeds), *cells(point.quality))
    return table


def deltas_table(found: Mapping[str, Curve], controls: Mapping[str, str]) -> Table:
    """BD-rate and BD-PSNR of every stage against its control or another reference, or why there are none."""
    table = Table(
        "Bjøntegaard deltas by pchip (–: curves are not monotone or do not overlap)",
        ("stage", "against", "λ", "BD-rate %", "BD-PSNR dB", "BD-rate % (MS-SSIM)"),
        left=2,
    )
    for name, control in controls.items():
        try:
            points, bd_rate, bd_psnr, bd_rate_ms_ssim = delta(found[name], found[control], control)
        except ValueError as error:
            table.add(name, str(error), "–", "–", "–", "–")
            continue
        values = number(bd_rate, "+.2f"), number(bd_psnr, "+.3f"), number(bd_rate_ms_ssim, "+.2f")
        table.add(name, control, str(points), *values)
    return table


def differing_images(chains: Iterable[ChainRecord]) -> str:
    """Which stages were evaluated on which images, if not all on the same, and what to do; else an empty text."""
    found: dict[tuple[str, tuple[str, ...], str], dict[str, None]] = {}
    for chain in chains:
        for name, stage in chain.published.items():
            known, images = stage.record.lineage.validation, stage.record.val_images
            names = known.images if known else ()
            found.setdefault((images.digest, names, images.name), {})[f"{name} at λ = {shortest(chain.lmbda)}"] = None
    if len(found) < 2:
        return ""
    lines = [f"{len(names)} of {folder}: {', '.join(stages)}" for (_, names, folder), stages in found.items()]
    return (
        f"the stages were evaluated on different images, so their points are not comparable: {'; '.join(lines)}. "
        "`hpcm evaluate IMAGES -c STAGE` measures a stage on other images; `hpcm run STAGE --force` builds it again"
    )


def all_on_kodak(chains: Iterable[ChainRecord]) -> bool:
    """Whether there are published stages and all were evaluated on the 24 Kodak images."""
    conditions = [stage.record.lineage.validation for chain in chains for stage in chain.published.values()]
    return bool(conditions) and all(known and is_kodak(known.images) for known in conditions)
