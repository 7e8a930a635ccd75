"""The time and memory that a chain will take: the contents of `estimate.json` in the chain's folder."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pipeline.common.contracts import read_contract
from pipeline.common.files import write_json

FILE = "estimate.json"


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step and of loading its batch, and peak memory in bytes, of one process."""

    step_seconds: float
    handover_seconds: float
    """A step during a handover; the same as another step for a segment without one."""
    batch_seconds: float
    """One batch of the loader alone."""
    process_bytes: int
    device_bytes: int | None
    """Memory that PyTorch reserved on the GPU; None on a CPU."""
    warm_up_seconds: float = 0.0
    """What the first steps take longer than the others, because caches, memory pools and kernels are set up in them."""


@dataclass(frozen=True)
class EvaluationCost:
    """Seconds for all validation images of a stage, and peak memory in bytes, as in StepCost."""

    estimate_seconds: float
    """The rate is estimated, as before the first step and after each segment."""
    coding_seconds: float
    """The images are coded into bitstreams, as at the end of the stage."""
    process_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class SegmentEstimate:
    """One segment of a stage, with its measured cost."""

    stage: str
    segment: str
    steps: int
    handover: int
    batch_size: int
    """Crops per step, over all processes."""
    workers: int
    cost: StepCost | None
    """None if the segment does not fit into the memory."""
    remedy: str = ""
    """The smallest change that makes the segment fit, or a message that none was found; empty if it fits."""

    def seconds(self, done: int = 0, loading: bool = True) -> float:
        """Seconds of the steps after the first `done`; infinite if the segment does not fit.

        Without `loading` they are the seconds that a stage records.
        """
        if self.cost is None:
            return math.inf
        steps = self.cost.handover_seconds, self.cost.step_seconds
        blended, plain = map(self._with_loader, steps) if loading else steps
        handed = max(self.handover - done, 0)
        return self.cost.warm_up_seconds + handed * blended + (self.steps - done - handed) * plain

    @property
    def pace(self) -> float:
        """Seconds from one step to the next, after the handover."""
        return self._with_loader(self.cost.step_seconds) if self.cost else 0.0

    @property
    def limit(self) -> Literal["loader", "device"]:
        """What a step waits for."""
        return "loader" if self.cost and self.cost.batch_seconds > self.cost.step_seconds else "device"

    def _with_loader(self, step: float) -> float:
        """Seconds per step, loading included. Workers load while the device computes; without workers the times add."""
        assert self.cost is not None
        return max(step, self.cost.batch_seconds) if self.workers else step + self.cost.batch_seconds


@dataclass(frozen=True)
class Estimate:
    """The segments that were not finished when a chain was measured."""

    device: str
    processes: int
    segments: tuple[SegmentEstimate, ...]
    evaluations: dict[str, EvaluationCost | None] = field(default_factory=dict)
    """By stage. None if the largest validation images do not fit into the memory."""

    @classmethod
    def read(cls, folder: Path) -> "Estimate | None":
        """The estimate in a chain's folder; None if it was not measured. Raises FileError if it is damaged."""
        path = folder / FILE
        return read_contract(cls, path) if path.exists() else None

    def write(self, folder: Path) -> None:
        """Save the estimate in a chain's folder. Raises FileError."""
        write_json(folder / FILE, asdict(self))

    def find(self, stage: str, segment: str, steps: int, handover: int) -> SegmentEstimate | None:
        """The estimate of a segment, with these numbers of steps. The chains of a sweep may differ in them."""
        found = (known for known in self.segments if (known.stage, known.segment) == (stage, segment))
        return next((replace(known, steps=steps, handover=handover) for known in found), None)
