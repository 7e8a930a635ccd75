"""`hpcm compare`: the costs of several codecs, measured in turns."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
from matplotlib.figure import Figure

from modules import HPCM
from pipeline.common.figure_style import codec_colors, legend_above, new_figure
from pipeline.common.fresh_process import in_fresh_process, within_memory
from pipeline.common.tables import Table
from pipeline.common.timing import machine
from pipeline.evaluation.multiplications import macs_per_pixel
from pipeline.evidence.contenders import ACTIVITIES, TRAINED, ComparisonError, Contender, Size
from pipeline.records import comparison as records
from pipeline.records.comparison import Comparison, Cost

COUNTED_AT = (512, 768)
"""Height and width at which multiplications are counted."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: sizes for coding, sizes for training steps, number of rounds, and whether memory too."""

    sizes: tuple[Size, ...]
    train_sizes: tuple[Size, ...]
    rounds: int
    memory: bool

    def work(self, contenders: Sequence[Contender]) -> list[tuple[Size, str, Contender]]:
        """All that one round measures, small sizes first. The contenders take turns at each activity."""
        sizes = sorted({*self.sizes, *self.train_sizes}, key=lambda size: size[0] * size[1])
        return [
            (size, activity, contender)
            for size in sizes
            for activity in ACTIVITIES
            for contender in contenders
            if activity in contender.activities and size in (self.train_sizes if activity in TRAINED else self.sizes)
        ]


def compare(title: str, contenders: Sequence[Contender], plan: Plan, device: str, note: Note) -> Comparison:
    """Measure all costs, and call `note` with each step. Raises ComparisonError if nothing fits into memory.

    The contenders take turns, so that other load on the machine slows all of them; every second round has the reverse
    order. What does not fit into memory is noted and left out.
    """
    sizes = []
    for contender in contenders:
        kmacs = macs_per_pixel(contender.config, *COUNTED_AT) / 1000
        note(f"{contender.name}: {kmacs:.1f} kMAC a pixel")
        parameters = sum(p.numel() for p in HPCM.on_meta(contender.config).parameters())
        sizes.append(records.Size(contender.name, parameters, kmacs))
    work = plan.work(contenders)
    peaks = {key: _peak(*key, device, note) for key in work} if plan.memory else {}
    samples: dict[tuple[Size, str, Contender], list[float]] = {key: [] for key in work}
    for turn in range(plan.rounds):
        for key in list(reversed(work) if turn % 2 else work):
            size, activity, contender = key
            found = within_memory(partial(contender.seconds, activity, size, device))
            shown = f"{size_name(size)} {activity} of {contender.name}"
            if found is None:
                note(f"{shown}: out of memory; left out")
                work.remove(key)
                continue
            note(f"{shown}: round {turn + 1} of {plan.rounds}")
            samples[key].append(found)
    if not work:
        raise ComparisonError(f"{title}: nothing fits into the memory of {device}; give smaller sizes or fewer codecs")
    costs = tuple(Cost(key[2].name, size_name(key[0]), key[1], tuple(samples[key]), peaks.get(key)) for key in work)
    trained = all(contender.checkpoint is not None for contender in contenders)
    now = int(1000 * time.time())
    return Comparison(title, device, machine(device), torch.__version__, plan.rounds, trained, now, tuple(sizes), costs)


def _peak(size: Size, activity: str, contender: Contender, device: str, note: Note) -> int | None:
    """Peak memory, measured in a fresh process; None if it ran out of memory or died."""
    found = in_fresh_process(contender.peak, activity, size, device)
    shown = "no figure: out of memory, or its process died" if found is None else f"{found / 2**20:.0f} MiB"
    note(f"{size_name(size)} {activity}, memory of {contender.name}: {shown}")
    return found


def size_name(size: Size) -> str:
    """`512×768`, height × width."""
    return f"{size[0]}×{size[1]}"


def new_folder(runs: Path, title: str) -> Path:
    """A new folder for a comparison, `<title>-<n>` with the first free number."""
    name = re.sub(r"[^\w.-]+", "-", title)
    return next(path for n in count(1) if not (path := runs / records.FOLDER / f"{name}-{n}").exists())


def tables(comparison: Comparison) -> Iterable[Table]:
    """A table of parameters and multiplications, then one of times and memory per image size."""
    first = comparison.codecs[0]
    title = f"{comparison.title} on {comparison.device} ({comparison.machine}), {comparison.rounds} rounds"
    sizes = Table(title, ("codec", "parameters", "kMAC/pixel", f"× {first.codec}"))
    for codec in comparison.codecs:
        ratio = codec.kmacs_per_pixel / first.kmacs_per_pixel
        sizes.add(codec.codec, f"{codec.parameters:,}", f"{codec.kmacs_per_pixel:.1f}", f"{ratio:.2f}")
    yield sizes
    for size in comparison.sizes:
        columns = _columns(comparison, size)
        table = Table(f"{size}: seconds and peak memory in MiB (× {first.codec})", ("codec", *columns))
        for codec in comparison.codecs:
            cells = (column.get(codec.codec, ("–", None)) for column in columns.values())
            table.add(codec.codec, *(text + (f" ({ratio:.2f})" if ratio else "") for text, ratio in cells))
        yield table


Column = dict[str, tuple[str, float | None]]
"""A value as text, and its ratio to the first codec's, by codec."""


def _columns(comparison: Comparison, size: str) -> dict[str, Column]:
    """What was measured at a size, by heading."""
    found: dict[str, Column] = {}
    for activity in ACTIVITIES:
        costs = comparison.of(size, activity)
        ratios = {name: comparison.ratios(cost) for name, cost in costs.items()}
        found[activity] = {name: (f"{cost.seconds:.3f}", ratios[name][0]) for name, cost in costs.items()}
        memory = {name: f"{cost.bytes / 2**20:.0f}" for name, cost in costs.items() if cost.bytes}
        found[f"memory, {activity}"] = {name: (shown, ratios[name][1]) for name, shown in memory.items()}
    return {heading: column for heading, column in found.items() if column}


def draw(comparison: Comparison) -> Figure:
    """Bars of all costs relative to the first codec, with one panel per image size."""
    names = [codec.codec for codec in comparison.codecs]
    figure, axes = new_figure(len(comparison.sizes), height=2.6)
    colors = codec_colors(names)
    for axis, size in zip(axes, comparison.sizes, strict=True):
        groups = {
            heading.replace(", ", ",\n").replace("unfrozen", "training step"): column
            for heading, column in _columns(comparison, size).items()
            if any(ratio for _, ratio in column.values())
        }
        if size == size_name(COUNTED_AT):
            first = comparison.codecs[0].kmacs_per_pixel
            groups = {"MACs": {c.codec: ("", c.kmacs_per_pixel / first) for c in comparison.codecs}, **groups}
        width = 0.8 / len(names)
        for place, codec in enumerate(names):
            at = [index + (place - (len(names) - 1) / 2) * width for index in range(len(groups))]
            heights = [column.get(codec, ("", None))[1] or 0 for column in groups.values()]
            axis.bar(at, heights, width, color=colors[codec], label=codec)
        axis.axhline(1, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(groups)), list(groups))
        axis.set(title=size, ylabel=f"× {names[0]}")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    legend_above(figure, axes[0], len(names))
    return figure
