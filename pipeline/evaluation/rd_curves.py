"""Rate–distortion curves: the Bjøntegaard deltas between two, and the curves that others published."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bjontegaard
import numpy as np
from matplotlib.figure import Figure

from pipeline.common.errors import UserError
from pipeline.common.figure_style import legend_above, new_figure
from pipeline.common.files import check_regular
from pipeline.weights.published import Quality

Curve = Sequence[Quality]
METHOD = "pchip"
"""Interpolation: monotone between the points, and a line through two points. Cubic fits need four."""
LARGEST_FILE = 2**20
"""Largest size in bytes of a file with a curve."""
KODAK_NAMES = frozenset(f"kodim{n:02d}" for n in range(1, 25))
SPELLINGS = {"bpp": ("bpp", "rate"), "psnr_db": ("psnr-rgb", "psnr"), "ms_ssim": ("ms-ssim-rgb", "ms-ssim", "msssim")}
"""Names of the values in CSV and in CompressAI's JSON. `_` is read as `-`, and capitals as small letters."""


def _points(*pairs: tuple[float, float]) -> tuple[Quality, ...]:
    return tuple(Quality(bpp, psnr_db, None, bpp) for bpp, psnr_db in pairs)


PUBLISHED = {
    "hpcm-base-kodak": _points(
        (0.1211, 29.4022), (0.1757, 30.7547), (0.2729, 32.4012), (0.4125, 34.2063), (0.5898, 36.0145), (0.8209, 37.7525)
    ),
    "hpcm-large-kodak": _points(
        (0.0951, 28.9135), (0.1537, 30.4490), (0.2438, 32.1219), (0.3778, 33.9923), (0.5516, 35.8511), (0.7843, 37.7480)
    ),
}  # fmt: skip
"""HPCM-Base and HPCM-Large on the 24 Kodak images, as their authors published them (arXiv 2507.19125)."""


def bd_rate(curve: Curve, reference: Curve) -> float | None:
    """Per cent of rate at equal PSNR; None if the curves do not overlap, or are not monotone."""
    return _delta(bjontegaard.bd_rate, curve, reference, lambda quality: quality.psnr_db)


def bd_psnr(curve: Curve, reference: Curve) -> float | None:
    """PSNR in dB at equal rate; None as for `bd_rate`."""
    return _delta(bjontegaard.bd_psnr, curve, reference, lambda quality: quality.psnr_db)


def bd_rate_ms_ssim(curve: Curve, reference: Curve) -> float | None:
    """Per cent of rate at equal MS-SSIM; None as for `bd_rate`, and if an MS-SSIM is not known."""
    return _delta(bjontegaard.bd_rate, curve, reference, ms_ssim_db)


def _delta(measure: Any, curve: Curve, reference: Curve, of: Callable[[Quality], float | None]) -> float | None:
    both = [sorted((quality.bpp, of(quality)) for quality in points) for points in (reference, curve)]
    if any(value is None for points in both for _, value in points) or min(map(len, both)) < 2:
        return None
    (rates, values), (other_rates, other_values) = (np.array(points, float).T for points in both)
    along = (values, other_values) if measure is bjontegaard.bd_rate else (rates, other_rates)
    overlap = max(map(min, along)) < min(map(max, along))
    if not overlap or any(np.any(np.diff(line) <= 0) for line in (rates, values, other_rates, other_values)):
        return None
    lines, options = (rates, values, other_rates, other_values), {"min_overlap": 0, "require_matching_points": False}
    return float(measure(*lines, method=METHOD, **options))


def ms_ssim_db(quality: Quality) -> float | None:
    """MS-SSIM in dB: −10·log₁₀(1 − MS-SSIM)."""
    return None if quality.ms_ssim is None else -10 * float(np.log10(max(1 - quality.ms_ssim, 1e-10)))


def draw_curves(shown: Mapping[str, tuple[Curve, dict[str, Any]]], similar: bool, rate: str, columns: int) -> Figure:
    """PSNR and, if `similar`, MS-SSIM over rate, of curves by name, each with matplotlib's settings of its line.

    `rate` is the label of the axis, and `columns` the number of columns of the legend.
    """
    figure, axes = new_figure(1, 2 if similar else 1, height=3.4)
    for name, (curve, style) in shown.items():
        rates = [quality.bpp for quality in curve]
        axes[0].plot(rates, [quality.psnr_db for quality in curve], label=name, **style)
        if similar and any(quality.ms_ssim is not None for quality in curve):
            axes[1].plot(rates, np.array([ms_ssim_db(quality) for quality in curve], float), **style)
    for axis, label in zip(axes, ("PSNR in dB", "MS-SSIM in dB"), strict=False):
        axis.set(xlabel=rate, ylabel=label)
        axis.grid(alpha=0.3)
        axis.margins(0.06)
    legend_above(figure, axes[0], columns)
    return figure


def is_kodak(names: Iterable[str]) -> bool:
    """Whether these are the names of the 24 Kodak images, in any folder and with any suffix."""
    stems = [name.rsplit("/", 1)[-1].split(".")[0] for name in names]
    return len(stems) == len(KODAK_NAMES) and set(stems) == KODAK_NAMES


def read_curve(path: Path) -> tuple[str, tuple[Quality, ...]]:
    """The title and points of a curve in a CSV file with a header, or in the JSON of CompressAI's tools.

    There must be columns of bits per pixel and PSNR in dB. MS-SSIM is optional, from 0 to 1 or in dB. Raises UserError,
    which names the file and what is wrong with it.
    """
    if check_regular(path, UserError).st_size > LARGEST_FILE:
        raise UserError(f"{path}: too large for a curve")
    try:
        text = path.read_text(encoding="utf-8-sig")
        title, columns = _json_columns(text) if text.lstrip().startswith("{") else ("", _csv_columns(text))
        return title or path.stem, _curve(columns)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error, OSError) as error:
        raise UserError(
            f"{path}: not a curve ({error}); expected CSV with the columns bpp, psnr and, if known, ms-ssim, "
            "or JSON as CompressAI writes it"
        ) from error


def _json_columns(text: str) -> tuple[str, dict[str, list[float]]]:
    content = json.loads(text)
    return str(content.get("name", "")), {_key(name): values for name, values in content["results"].items()}


def _csv_columns(text: str) -> dict[str, list[float]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise ValueError("the file is empty")
    delimiter = next((sign for sign in "\t;" if sign in lines[0]), ",")
    header, *rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return {_key(name): [row[at] for row in rows] for at, name in enumerate(header)}  # type: ignore[misc]


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _curve(columns: Mapping[str, Sequence[Any]]) -> tuple[Quality, ...]:
    found = {name: next((columns[key] for key in keys if key in columns), None) for name, keys in SPELLINGS.items()}
    for name in ("bpp", "psnr_db"):
        if not found[name]:
            raise ValueError(f"no values of {name}")
    similarity = found["ms_ssim"] or [None] * len(found["bpp"] or ())
    rows = zip(found["bpp"] or (), found["psnr_db"] or (), similarity, strict=True)
    points = [Quality(float(bpp), float(psnr), _similarity(value), float(bpp)) for bpp, psnr, value in rows]
    numbers = [number for point in points for number in (point.bpp, point.psnr_db, point.ms_ssim or 0)]
    if not np.isfinite(numbers).all() or min(numbers) < 0:
        raise ValueError("a value is negative or not finite")
    return tuple(sorted(points, key=lambda point: point.bpp))


def _similarity(value: Any) -> float | None:
    """MS-SSIM from 0 to 1. A larger number is in dB."""
    if value is None or value == "":
        return None
    number = float(value)
    return 1 - 10 ** (-number / 10) if number > 1 else number
