"""A figure of each stage's gain or loss against its control."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pipeline.common.figure_style import new_figure
from pipeline.common.tables import shortest
from pipeline.evidence.control_gains import EXPECTED, Gain

MODERATE = 50.0
"""Per cent. If a gain or loss is larger, the axis is logarithmic beyond ±10 %."""


def draw(found: Sequence[Gain]) -> Figure:
    """Rate at equal PSNR by stage and λ, with the deviation over seeds. Bands show what the design expected."""
    rates = {(gain.stage, gain.lmbda): gain.rate_percent for gain in found if gain.rate_percent is not None}
    # Phases first, then all other stages.
    stages = sorted(dict.fromkeys(stage for stage, _ in rates), key=lambda stage: not stage.startswith("phase"))
    lmbdas = sorted({lmbda for _, lmbda in rates})
    figure, (axis,) = new_figure(1, height=0.5 + 0.3 * len(stages))
    for phase, (low, high) in enumerate(EXPECTED["rate"], start=1):
        if (name := f"phase{phase}") in stages:
            label = None if axis.patches else "expected"
            axis.barh(stages.index(name), high - low, 0.7, low, color="#17734a", alpha=0.25, label=label)
    shades = colormaps["viridis"](np.linspace(0.1, 0.8, len(lmbdas)))
    for number, (lmbda, shade) in enumerate(zip(lmbdas, shades, strict=True)):
        points = {stage: rate for (stage, at), rate in rates.items() if at == lmbda}
        axis.errorbar(
            [rate.mean for rate in points.values()],
            [stages.index(stage) + 0.2 * (number - (len(lmbdas) - 1) / 2) for stage in points],
            xerr=[rate.deviation or np.nan for rate in points.values()],
            fmt="o", markersize=4, color=shade, capsize=3, label=f"λ = {shortest(lmbda)}",
        )  # fmt: skip
    if max(abs(rate.mean) for rate in rates.values()) > MODERATE:
        axis.set_xscale("symlog", linthresh=10)
        axis.xaxis.set_major_formatter("{x:g}")
    axis.axvline(0, color="0.3", linewidth=1, zorder=0)
    axis.set(yticks=range(len(stages)), yticklabels=stages, xlabel="rate at equal PSNR against the control, %")
    axis.use_sticky_edges = False
    axis.margins(0.06)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(lmbdas) + 1, frameon=False)
    return figure
