"""The record of a comparison of costs: `comparison.json` in a folder of `runs/comparisons/`."""

from __future__ import annotations

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
    def first(self) -> str:
        """Name of the codec with which the others are compared."""
        return self.codecs[0].codec

    @property
    def sizes(self) -> list[str]:
        """Image sizes, in the order in which they were measured."""
        return list(dict.fromkeys(cost.size for cost in self.costs))

    def of(self, size: str, activity: str) -> dict[str, Cost]:
        """Costs of an activity at a size, by codec."""
        return {cost.codec: cost for cost in self.costs if (cost.size, cost.activity) == (size, activity)}

    def ratio(self, cost: Cost) -> float | None:
        """Time relative to the first codec: median of the rounds' ratios, in which load on a whole round cancels."""
        first = self.of(cost.size, cost.activity).get(self.first)
        return statistics.median(a / b for a, b in zip(cost.samples, first.samples, strict=True)) if first else None

    def memory_ratio(self, cost: Cost) -> float | None:
        """Peak memory relative to the first codec."""
        first = self.of(cost.size, cost.activity).get(self.first)
        return cost.bytes / first.bytes if first and first.bytes and cost.bytes else None

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """Read a comparison. Raises FileError, naming the file, if it is missing or damaged."""
        return read_contract(cls, folder / FILE)

    def write(self, folder: Path) -> None:
        """Write the comparison. Raises FileError."""
        write_json(folder / FILE, asdict(self))


def read_comparisons(runs: Path) -> list[Comparison]:
    """All comparisons in a folder of runs, oldest first. Raises FileError for a damaged one."""
    found = [Comparison.read(path.parent) for path in (runs / FOLDER).glob(f"*/{FILE}")]
    return sorted(found, key=lambda comparison: comparison.time)
