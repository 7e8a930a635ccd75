"""The resources of a job, and the devices of this machine."""

import os
import re
from dataclasses import dataclass

from pipeline.common.errors import UserError

LONGEST = 365 * 24 * 60
"""Minutes that a job on this machine may take if no limit is given."""


class ClusterError(UserError):
    """Jobs cannot be submitted or looked up. The message says what to do."""


@dataclass(frozen=True)
class Resources:
    """The resources of each job. A job has one process per GPU, or one process if it has no GPU."""

    gpus: int | None = None
    """GPUs per node. None: one, or on this machine none if it has no GPU."""
    nodes: int = 1
    minutes: float | None = None
    """Time limit. The job saves before it, and is then queued again."""
    partition: str | None = None
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, such as `account=vision`."""

    def sbatch_options(self) -> dict[str, str]:
        """The options in `sbatch` by name. Raises ClusterError for one that is not `name=value`."""
        pairs = [option.partition("=") for option in self.sbatch]
        for name, _, value in pairs:
            if not (name and value):
                raise ClusterError(f"--sbatch {name}: expected name=value, such as --sbatch mem=32G")
        return {name.lstrip("-"): value for name, _, value in pairs}


def minutes_of(text: str) -> float:
    """Minutes from `12:00` (hours and minutes) or `1-12:00` (days before them). Raises ClusterError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)", text)
    if not found:
        raise ClusterError(f"--time {text}: expected hours:minutes, such as 12:00, or days-hours:minutes")
    days, hours, minutes = (int(part or 0) for part in found.groups())
    if not days + hours + minutes:
        raise ClusterError(f"--time {text}: a job needs at least a minute")
    return float((24 * days + hours) * 60 + minutes)


def places(gpus: int | None) -> list[tuple[int, ...]]:
    """The GPUs of each job that can run on this machine at the same time. An empty tuple is a place on the CPU.

    A place on the CPU takes OMP_NUM_THREADS cores, or all cores if that is not set. Raises ClusterError if the machine
    has fewer GPUs than a job needs.
    """
    known = _visible_gpus() if gpus != 0 else []
    gpus = min(1, len(known)) if gpus is None else gpus
    if gpus == 0:
        cores = len(os.sched_getaffinity(0))
        return [()] * max(1, cores // int(os.environ.get("OMP_NUM_THREADS") or cores))
    if gpus > len(known):
        raise ClusterError(f"--gpus {gpus}: PyTorch finds only {len(known)} on this machine; give a smaller number")
    return [tuple(known[first : first + gpus]) for first in range(0, len(known) - gpus + 1, gpus)]


def _visible_gpus() -> list[int]:
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return [int(number) for number in listed][:count] if all(map(str.isdigit, listed)) else list(range(count))
