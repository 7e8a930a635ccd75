"""The figures of chains: rate–distortion curves, gains against controls, and training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from pipeline.common.figure_style import codec_colors, legend_above, new_figure
from pipeline.common.tables import shortest
from pipeline.evaluation.rd_curves import PUBLISHED, draw_curves
from pipeline.evidence.gains import Gain
from pipeline.evidence.rate_distortion import Curve
from pipeline.records.chains import ChainRecord
from pipeline.records.metrics import read_history
from pipeline.weights.published import Quality

MODERATE = 50.0
"""Per cent. If a gain or loss is larger, the axis of gains is logarithmic beyond ±10 %."""
MARKERS = "o^sDvPX<>ph*"
GAIN = "rate at equal PSNR against the control, %"
MEASURES = (("bpp", "estimated rate in bits per pixel"), ("psnr_db", "PSNR in dB"))


def curves(found: Mapping[str, Curve], kodak: bool = False) -> Figure:
    """PSNR and, if known, MS-SSIM over rate. With `kodak`, the published curves are added."""
    shown: dict[str, tuple[Sequence[Quality], dict[str, Any]]] = {}
    for (name, curve), color in zip(found.items(), codec_colors(list(found)).values(), strict=True):
        line = {"linestyle": "--", "markersize": 3} if name.startswith("control") else {"markersize": 4}
        shown[name] = [point.quality for point in curve], {"color": color, "marker": "o", **line}
    for (name, published), color in zip(PUBLISHED.items() if kodak else (), ("0.5", "0.3"), strict=False):
        shown[f"{name}, published"] = published, {"linestyle": ":", "color": color, "marker": "x"}
    similar = all(point.quality.ms_ssim is not None for curve in found.values() for point in curve)
    return draw_curves(shown, similar, "coded rate in bits per pixel", columns=5)


def gains(found: Sequence[Gain]) -> Figure:
    """Rate at equal PSNR by stage and λ, with the deviation over seeds."""
    rates = {(gain.stage, gain.lmbda): gain.rate_percent for gain in found if gain.rate_percent is not None}
    stages = list(dict.fromkeys(stage for stage, _ in rates))
    lmbdas = sorted({lmbda for _, lmbda in rates})
    figure, (axis,) = new_figure(1, height=0.5 + 0.3 * len(stages))
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
    axis.set(yticks=range(len(stages)), yticklabels=stages, xlabel=GAIN)
    axis.margins(0.06)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    legend_above(figure, axis)
    return figure


def frontier(chain: ChainRecord, found: Sequence[Gain]) -> Figure:
    """Rate at equal PSNR in per cent, and multiplications, of each stage of a chain relative to its control."""
    kmacs = {name: stage.record.evaluated.kmacs_per_pixel for name, stage in chain.published.items()}
    points = sorted(
        (kmacs[gain.stage] / kmacs[gain.control], gain.stage, gain.rate_percent)
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
    axis.set(xlabel="multiplications ÷ control's", ylabel=GAIN)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def training(chain: ChainRecord) -> Figure:
    """Rate and PSNR of the training crops by step. Each stage starts at its parent's last step."""
    figure, axes = new_figure(len(MEASURES), height=2.3)
    colors = codec_colors(list(chain.published))
    shown: dict[str, list[float]] = {key: [] for key, _ in MEASURES}
    for name, stage in chain.published.items():
        start = chain.total_steps(name) - stage.record.steps
        history = read_history(stage.folder)
        for axis, (key, label) in zip(axes, MEASURES, strict=True):
            axis.axvline(start, color="0.85", linewidth=0.8, zorder=0)
            axis.set(ylabel=label)
            # One line for each segment, so that a segment without the measure leaves a gap.
            segments = (history.get(f"train/{segment['name']}/{key}", []) for segment in stage.record.schedule)
            for number, points in enumerate(filter(None, segments)):
                steps, values = zip(*points, strict=True)
                style = "--" if name.startswith("control") else "-"
                label_once = None if number else name
                axis.plot(start + np.array(steps), values, style, color=colors[name], linewidth=1, label=label_once)
                # A root starts so far off that it would hide all other curves.
                shown[key] += values if stage.record.parent else values[len(values) // 3 :]
    for axis, all_values in zip(axes, shown.values(), strict=True):
        if all_values:
            low, high = np.quantile(all_values, (0.01, 0.99))
            margin = 0.08 * (high - low) or 0.1  # One value has no range.
            axis.set_ylim(low - margin, high + margin)
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="training step along the chain")
    legend_above(figure, axes[0])
    return figure
