"""The style of every figure: the same color for a codec everywhere, and no frame at the top and right."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from matplotlib import colormaps, rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.common.files import replacing

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "hpcm",
}
# Names may contain `$`, and no label is a formula.
rcParams["text.parse_math"] = False
WIDTH = 7.2
"""Width of a figure in inches."""


def new_figure(rows: int, columns: int = 1, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Create a figure and its axes in reading order; `height` is that of one row, in inches."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, rows * height + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def legend_above(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """Put the legend of an axis above the figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns), frameon=False)


def codec_colors(names: Sequence[str]) -> dict[str, str]:
    """Colors by name: black for the Baseline, darker grays for later controls, and a color for each other codec."""
    palette = [to_hex(color) for color in colormaps["tab10"].colors]  # type: ignore[attr-defined]
    colors, others = {}, iter(palette[5:])
    for name in names:
        phase = re.fullmatch(r"phase(\d)", name)
        if phase:
            colors[name] = palette[(int(phase[1]) - 1) % 5]
        elif name == "baseline":
            colors[name] = "#111111"
        elif name.startswith("control"):
            step = int(name[-1]) if name[-1].isdecimal() else 3
            colors[name] = to_hex((0.85 - 0.1 * min(step, 5),) * 3)
        else:
            colors[name] = next(others, "#b0b0b0")
    return colors


def save(figure: Figure, target: Path | IO[bytes], kind: str = "png") -> None:
    """Write a figure as `png` or `svg`. The same figure always gives the same bytes."""
    if isinstance(target, Path):
        with replacing(target) as partial, partial.open("wb") as file:
            save(figure, file, kind)
        return
    with rc_context(STYLE):
        figure.savefig(target, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
