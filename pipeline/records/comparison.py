"""The record of a comparison of costs: `comparison.json` in a folder of `runs/comparisons/`."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.common.contracts import Long, read_contract
from pipeline.common.files import write_json

FOLDER = "comparisons"
"""In the folder of runs; each comparison has a folder of its own in it."""
FILE = "comparison.json"


@dataclass(frozen=True)
class Size:
    """A codec's number of parameters, and its multiplications."""

    codec: str
    parameters: int
    kmacs_per_pixel: float


@dataclass(frozen=True)
class Cost:
    """One activity of one codec at one image size (`512×768`, height × width)."""

    codec: str
    size: str
    activity: str
    samples: Annotated[tuple[float, ...], Field(min_length=1)]
    """Seconds, one value per round."""
    bytes: int | None
    """Peak memory; None if it was not measured."""

    @property
    def seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Comparison:
    """The results of one `hpcm compare`. The other codecs are compared with the first."""

    title: str
    device: str
    machine: str
    torch: str
    rounds: int
    trained: bool
    time: Long
    """When it was measured, in ms since 1970."""
    codecs: tuple[Size, ...]
    costs: tuple[Cost, ...]

    @property
    def sizes(self) -> list[str]:
        """Image sizes, in the order in which they were measured."""
        return list(dict.fromkeys(cost.size for cost in self.costs))

    def of(self, size: str, activity: str) -> dict[str, Cost]:
        """Costs of an activity at a size, by codec."""
        return {cost.codec: cost for cost in self.costs if (cost.size, cost.activity) == (size, activity)}

    def ratios(self, cost: Cost) -> tuple[float | None, float | None]:
        """Time and peak memory relative to the first codec; None if these were not measured for both.

        The time is the median of the rounds' ratios, in which load on a whole round cancels.
        """
        first = self.of(cost.size, cost.activity).get(self.codecs[0].codec)
        if first is None:
            return None, None
        time = statistics.median(a / b for a, b in zip(cost.samples, first.samples, strict=True))
        return time, cost.bytes / first.bytes if first.bytes and cost.bytes else None

    def write(self, folder: Path) -> None:
        """Write the comparison. Raises FileError."""
        write_json(folder / FILE, asdict(self))


def read_comparisons(runs: Path) -> list[Comparison]:
    """All comparisons in a folder of runs, oldest first. Raises FileError for a damaged one."""
    found = [read_contract(Comparison, path) for path in (runs / FOLDER).glob(f"*/{FILE}")]
    return sorted(found, key=lambda comparison: comparison.time)
