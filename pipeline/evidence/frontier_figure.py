"""A figure of rate against multiplications, for all codecs at one λ."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.common.figure_style import new_figure
from pipeline.evidence.control_gains import Gain
from pipeline.tracking.records import ChainRecord

MARKERS = "o^sDvPX<>ph*"


def draw(chain: ChainRecord, found: Sequence[Gain]) -> Figure:
    """Rate at equal PSNR in per cent, and multiplications, of each stage of a chain relative to its control."""
    kmacs = {name: stage.metrics["model/kmacs_per_pixel"] for name, stage in chain.published.items()}
    points = sorted(
        (kmacs[gain.stage] / kmacs[gain.reference], gain.stage, gain.rate_percent)
        for gain in found
        if gain.rate_percent is not None
    )
    figure, (axis,) = new_figure(1, height=3.6)
    axis.axhline(0, color="0.3", linewidth=1, zorder=0)
    axis.plot(1, 0, "kD", markersize=6, label="control")
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(points)))
    for number, ((multiplications, name, rate), shade) in enumerate(zip(points, shades, strict=True)):
        axis.errorbar(
            multiplications, rate.mean, yerr=rate.deviation or np.nan,
            fmt=MARKERS[number % len(MARKERS)], markersize=7, capsize=3, color=shade, label=name,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.25, 1.5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="multiplications ÷ control's", ylabel="rate at equal PSNR against the control, %")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
