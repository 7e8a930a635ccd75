"""Rate–distortion curves from MLflow's records, and the Bjøntegaard deltas between them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bjontegaard
import numpy as np
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator

from pipeline.common.figure_style import codec_colors, new_figure
from pipeline.common.tables import Table, number, shortest
from pipeline.evaluation.results import mean_quality
from pipeline.tracking.records import ChainRecord, Records
from pipeline.weights.published import Quality

METHOD = "pchip"
"""Interpolation: monotone between the points, and a line through two points. Cubic fits need four."""
KODAK_NAMES = frozenset(f"kodim{n:02d}" for n in range(1, 25))
PUBLISHED = (
    (0.1211, 29.4022), (0.1757, 30.7547), (0.2729, 32.4012), (0.4125, 34.2063), (0.5898, 36.0145), (0.8209, 37.7525),
)  # fmt: skip
"""Bits per pixel and PSNR in dB of HPCM-Base on Kodak, published by its authors."""


@dataclass(frozen=True)
class Point:
    """One λ of a curve: mean quality over `seeds` seeds."""

    lmbda: float
    quality: Quality
    seeds: int


Curve = list[Point]


@dataclass(frozen=True)
class Delta:
    """A curve against its reference over the `points` λ that both have. Deltas are None without an overlap."""

    reference: str
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
            assert stage.quality is not None  # published stages have one
            found.setdefault(name, {}).setdefault(chain.lmbda, {})[chain.seed] = stage.quality
    return {name: _curve(points) for name, points in found.items()}


def _curve(points: Mapping[float, Mapping[int, Quality]]) -> Curve:
    """A curve from qualities by λ and seed."""
    shared = set.intersection(*(set(seeds) for seeds in points.values()))
    chosen = {
        lmbda: [quality for seed, quality in seeds.items() if seed in shared or not shared]
        for lmbda, seeds in points.items()
    }
    return [Point(lmbda, mean_quality(chosen[lmbda]), len(chosen[lmbda])) for lmbda in sorted(chosen)]


def references(chains: Iterable[ChainRecord]) -> dict[str, str]:
    """The reference of every stage that has one: a control if any chain has one."""
    found: dict[str, str] = {}
    for chain in chains:
        for name in chain.published:
            reference = chain.reference(name)
            if reference is not None and (name not in found or chain.published[reference].parent is not None):
                found[name] = reference
    return found


def uncontrolled(chains: Sequence[ChainRecord]) -> set[str]:
    """Stages whose reference was trained for another number of steps. More training alone lowers the loss, so a
    difference from such a reference is no gain of the stage."""
    return {
        name
        for name, reference in references(chains).items()
        for chain in chains
        if {name, reference} <= chain.published.keys() and chain.total_steps(name) != chain.total_steps(reference)
    }


def delta(curve: Curve, reference: Curve, reference_name: str) -> Delta:
    """Compare two curves at the λ that both have; raises ValueError for fewer than two λ."""
    shared = {point.lmbda for point in curve} & {point.lmbda for point in reference}
    if len(shared) < 2:
        raise ValueError(f"{len(shared)} λ in common with {reference_name}; a curve needs two or more")
    ours, theirs = ([point.quality for point in points if point.lmbda in shared] for points in (curve, reference))
    similarity = [[ms_ssim_db(quality) for quality in qualities] for qualities in (theirs, ours)]
    rates = [[quality.bpp for quality in qualities] for qualities in (theirs, ours)]
    psnr = [[quality.psnr_db for quality in qualities] for qualities in (theirs, ours)]
    return Delta(
        reference_name,
        len(shared),
        _bjontegaard(bjontegaard.bd_rate, rates, psnr),
        _bjontegaard(bjontegaard.bd_psnr, rates, psnr),
        _bjontegaard(bjontegaard.bd_rate, rates, similarity),
    )


def _bjontegaard(measure: Any, rates: Sequence[Sequence[float]], distortions: Sequence[Sequence[Any]]) -> float | None:
    """The measure of (reference, other); None if the curves are not monotone or do not overlap."""
    if any(value is None for values in distortions for value in values):
        return None
    along = distortions if measure is bjontegaard.bd_rate else rates
    if max(map(min, along)) >= min(map(max, along)):
        return None
    ordered = [(*zip(*sorted(zip(*pair, strict=True)), strict=True),) for pair in zip(rates, distortions, strict=True)]
    if any(np.any(np.diff(values) <= 0) for pair in ordered for values in pair):
        return None
    return float(measure(*ordered[0], *ordered[1], method=METHOD, min_overlap=0))


def slope(curve: Curve, lmbda: float) -> float | None:
    """Slope at one of the curve's λ in dB per (bit per pixel); None for one point or a curve that is not monotone."""
    rates = [point.quality.bpp for point in curve]
    psnr = [point.quality.psnr_db for point in curve]
    if len(curve) < 2 or np.any(np.diff(rates) <= 0) or np.any(np.diff(psnr) <= 0):
        return None
    at = next(point.quality.bpp for point in curve if point.lmbda == lmbda)
    return float(PchipInterpolator(rates, psnr).derivative()(at)) or None


def ms_ssim_db(quality: Quality) -> float | None:
    """MS-SSIM in dB: −10·log₁₀(1 − MS-SSIM)."""
    return None if quality.ms_ssim is None else -10 * float(np.log10(max(1 - quality.ms_ssim, 1e-10)))


def deltas(found: Mapping[str, Curve], references: Mapping[str, str]) -> dict[str, Delta]:
    """Deltas of every stage against its reference, if both have two λ or more in common."""
    result = {}
    for name, reference in references.items():
        try:
            result[name] = delta(found[name], found[reference], reference)
        except ValueError:
            continue
    return result


def points_table(title: str, found: Mapping[str, Curve]) -> Table:
    """A table of all points of all curves."""
    table = Table(title, ("stage", "λ", "seeds", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss"))
    for name, curve in found.items():
        for point in curve:
            quality = point.quality
            table.add(
                name, shortest(point.lmbda), str(point.seeds), number(quality.bpp), number(quality.psnr_db, ".2f"),
                number(quality.ms_ssim), number(quality.rd_loss),
            )  # fmt: skip
    return table


def deltas_table(
    found: Mapping[str, Curve], references: Mapping[str, str], uncontrolled: Collection[str] = ()
) -> Table:
    """BD-rate and BD-PSNR of every stage, or why there are none. `uncontrolled` are stages without a control."""
    table = Table(
        "Bjøntegaard deltas against the reference, by pchip (–: curves are not monotone or do not overlap)",
        ("stage", "reference", "λ", "BD-rate %", "BD-PSNR dB", "BD-rate % (MS-SSIM)"),
        left=2,
    )
    for name, reference in references.items():
        if name in uncontrolled:
            table.add(name, f"no control: {reference} was trained for another number of steps", "–", "–", "–", "–")
            continue
        try:
            d = delta(found[name], found[reference], reference)
        except ValueError as error:
            table.add(name, str(error), "–", "–", "–", "–")
            continue
        values = number(d.bd_rate, "+.2f"), number(d.bd_psnr, "+.3f"), number(d.bd_rate_ms_ssim, "+.2f")
        table.add(name, reference, str(d.points), *values)
    return table


def all_on_kodak(records: Records, chains: Iterable[ChainRecord]) -> bool:
    """Whether there are published stages and all were evaluated on the 24 Kodak images."""
    stages = [stage for chain in chains for stage in chain.published.values()]
    return bool(stages) and all(is_kodak(records.validation_images(stage)) for stage in stages)


def is_kodak(names: Iterable[str]) -> bool:
    """Whether these are the names of the 24 Kodak images, in any folder and with any suffix."""
    stems = [name.rsplit("/", 1)[-1].split(".")[0] for name in names]
    return len(stems) == len(KODAK_NAMES) and set(stems) == KODAK_NAMES


def draw(found: Mapping[str, Curve], kodak: bool = False) -> Figure:
    """PSNR and, if known, MS-SSIM over rate. With `kodak`, the published curve is added."""
    similar = all(point.quality.ms_ssim is not None for curve in found.values() for point in curve)
    figure, axes = new_figure(1, 2 if similar else 1, height=3.4)
    colors = codec_colors(list(found))
    for name, curve in found.items():
        style: dict[str, Any] = {"color": colors[name], "label": name, "marker": "o", "markersize": 4}
        if name.startswith("control"):
            style |= {"linestyle": "--", "markersize": 3}
        rates = [point.quality.bpp for point in curve]
        axes[0].plot(rates, [point.quality.psnr_db for point in curve], **style)
        if similar:
            axes[1].plot(rates, np.array([ms_ssim_db(point.quality) for point in curve], float), **style)
    if kodak:
        axes[0].plot(*zip(*PUBLISHED, strict=True), ":", color="0.5", marker="x", label="HPCM-Base, published")
    for axis, label in zip(axes, ("PSNR in dB", "MS-SSIM in dB"), strict=False):
        axis.set(xlabel="coded rate in bits per pixel", ylabel=label)
        axis.grid(alpha=0.3)
        axis.margins(0.08)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
    return figure
