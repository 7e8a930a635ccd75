"""A comparison as tables and as a figure."""

from collections.abc import Iterable

from matplotlib.figure import Figure

from pipeline.common.figure_style import codec_colors, new_figure
from pipeline.common.tables import Table, number
from pipeline.evidence.comparison import COUNTED_AT, Comparison, size_name
from pipeline.evidence.measurement import CODING, MEMORY, TRAINING


def tables(comparison: Comparison) -> Iterable[Table]:
    """A table of parameters and multiplications, then a table of times and one of memory per image size."""
    first = comparison.codecs[0]
    size = Table(
        f"{comparison.title} on {comparison.device} ({comparison.machine}), {comparison.rounds} rounds",
        ("codec", "parameters", "kMAC/pixel", f"× {first}"),
    )
    for codec in comparison.codecs:
        kmacs = comparison.kmacs_per_pixel
        size.add(
            codec, f"{comparison.parameters[codec]:,}", f"{kmacs[codec]:.1f}", f"{kmacs[codec] / kmacs[first]:.2f}"
        )
    yield size
    for name in comparison.sizes:
        yield _times(comparison, name)
        if any(peak.size == name for peak in comparison.peaks):
            yield _memory(comparison, name)


def _times(comparison: Comparison, size: str) -> Table:
    measured = {cost.activity for cost in comparison.costs if cost.size == size}
    activities = [activity for activity in (*CODING, *TRAINING) if activity in measured]
    table = Table(f"{size}: seconds (× {comparison.codecs[0]})", ("codec", *activities))
    for codec in comparison.codecs:
        costs = [comparison.cost(codec, size, activity) for activity in activities]
        table.add(codec, *("–" if c is None else f"{c.seconds:.3f}{_times_first(c.ratio)}" for c in costs))
    return table


def _memory(comparison: Comparison, size: str) -> Table:
    first = comparison.codecs[0]
    measured = {peak.activity for peak in comparison.peaks if peak.size == size}
    activities = [activity for activity in MEMORY if activity in measured]
    headings = ["encode and decode" if activity == "decode" else activity for activity in activities]
    table = Table(f"{size}: peak memory in MiB (× {first})", ("codec", *headings))
    for codec in comparison.codecs:
        cells = []
        for activity in activities:
            found, reference = comparison.peak(codec, size, activity), comparison.peak(first, size, activity)
            ratio = found / reference if found and reference else None
            cells.append(number(found and found / 2**20, ".0f") + _times_first(ratio))
        table.add(codec, *cells)
    return table


def _times_first(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f})"


def draw(comparison: Comparison) -> Figure:
    """Bars of all costs relative to the first codec, with one panel per image size."""
    sizes = comparison.sizes
    figure, axes = new_figure(len(sizes), height=2.6)
    colors = codec_colors(comparison.codecs)
    for axis, size in zip(axes, sizes, strict=True):
        labels, groups = _ratios(comparison, size)
        width = 0.8 / len(comparison.codecs)
        for place, codec in enumerate(comparison.codecs):
            at = [index + (place - (len(comparison.codecs) - 1) / 2) * width for index in range(len(labels))]
            axis.bar(at, [group.get(codec, 0) for group in groups], width, color=colors[codec], label=codec)
        axis.axhline(1, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(labels)), labels)
        axis.set(title=size, ylabel=f"× {comparison.codecs[0]}")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _ratios(comparison: Comparison, size: str) -> tuple[list[str], list[dict[str, float]]]:
    """Labels of the groups of bars, and the ratio of each codec in each group."""
    first = comparison.codecs[0]
    labels, groups = [], []
    if size == size_name(COUNTED_AT):
        kmacs = comparison.kmacs_per_pixel
        labels.append("MACs")
        groups.append({codec: kmacs[codec] / kmacs[first] for codec in comparison.codecs})
    for activity in (*CODING, *TRAINING):
        found = {c.codec: c.ratio for c in comparison.costs if (c.size, c.activity) == (size, activity) and c.ratio}
        if found:
            labels.append({"unfrozen": "training step"}.get(activity, activity))
            groups.append(found)
    for activity, label in (("decode", "memory,\ncoding"), ("unfrozen", "memory,\ntraining")):
        reference = comparison.peak(first, size, activity)
        if reference:
            labels.append(label)
            peaks = {codec: comparison.peak(codec, size, activity) for codec in comparison.codecs}
            groups.append({codec: peak / reference for codec, peak in peaks.items() if peak})
    return labels, groups
