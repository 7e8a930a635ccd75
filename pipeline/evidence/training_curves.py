"""Rate and PSNR during training, through all stages of a chain."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.common.figure_style import codec_colors, new_figure
from pipeline.tracking.records import ChainRecord, History, Records, StageRecord

MEASURES = (("bpp", "estimated rate in bits per pixel"), ("psnr_db", "PSNR in dB"))


def draw(records: Records, chain: ChainRecord) -> Figure:
    """Rate and PSNR of the training crops by step. Each stage starts at its parent's last step."""
    figure, axes = new_figure(len(MEASURES), height=2.3)
    colors = codec_colors(list(chain.published))
    for axis, (key, label) in zip(axes, MEASURES, strict=True):
        shown: list[float] = []
        for name, stage in chain.published.items():
            start = chain.total_steps(name) - stage.steps
            for number, curve in enumerate(_pieces(records, stage, key)):
                steps, values = [start + step for step, _ in curve], [value for _, value in curve]
                style = "--" if name.startswith("control") else "-"
                axis.plot(steps, values, style, color=colors[name], linewidth=1, label=None if number else name)
                # A Baseline starts so far off that it would hide all other curves.
                shown += values if stage.parent else values[len(values) // 3 :]
            axis.axvline(start, color="0.85", linewidth=0.8, zorder=0)
        if shown:
            low, high = np.quantile(shown, (0.01, 0.99))
            axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axis.set(ylabel=label)
        axis.grid(alpha=0.3)
    axes[-1].set(xlabel="training step along the chain")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
    return figure


def _pieces(records: Records, stage: StageRecord, key: str) -> Sequence[History]:
    """The measure of each segment that has it. Other segments leave a gap."""
    keys = [f"train/{segment.name}/{key}" for segment in stage.segments]
    return [records.history(stage.run_id, key) for key in keys if key in stage.metrics]
