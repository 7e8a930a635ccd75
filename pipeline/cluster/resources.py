"""What a job asks for, and the devices of this machine."""

import os
import re
from dataclasses import dataclass

from pipeline.common.errors import UserError

LONGEST = 365 * 24 * 60
"""Minutes that a job on this machine may take if no limit is given."""


class ClusterError(UserError):
    """Jobs cannot be submitted or looked up; the message says what to do."""


@dataclass(frozen=True)
class Resources:
    """What each job gets. A job has one process per GPU, and one process without GPUs."""

    gpus: int | None = None
    """GPUs per node; None for one, or for none on a machine without."""
    nodes: int = 1
    minutes: float | None = None
    """Time limit. Before it the job saves, and then queues again."""
    partition: str | None = None
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, each as `account=vision`."""

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
    """The GPUs of each job that fits on this machine at the same time; an empty tuple is a place on the CPU.

    The CPU has as many places as it has cores for OMP_NUM_THREADS threads each, and one by default. Raises
    ClusterError if the machine has fewer GPUs than a job needs.
    """
    known = _visible_gpus() if gpus != 0 else []
    gpus = min(1, len(known)) if gpus is None else gpus
    if gpus == 0:
        cores = len(os.sched_getaffinity(0))
        return [()] * max(1, cores // int(os.environ.get("OMP_NUM_THREADS") or cores))
    if gpus > len(known):
        raise ClusterError(f"--gpus {gpus}: PyTorch finds {len(known)} on this machine")
    return [tuple(known[first : first + gpus]) for first in range(0, len(known) - gpus + 1, gpus)]


def _visible_gpus() -> list[int]:
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return [int(number) for number in listed][:count] if all(map(str.isdigit, listed)) else list(range(count))
