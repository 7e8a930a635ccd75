"""Starts chains as jobs, on SLURM or on this machine."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from pipeline.cluster.records import ChainJobs, JobRecord
from pipeline.cluster.resources import LONGEST, ClusterError, Resources
from pipeline.cluster.resumable import WARNING, ResumableJob, Work

SIGNAL = WARNING.name.removeprefix("SIG")
SAVING_SECONDS = 120
"""Seconds before the time limit at which a job is told to save, or a sixth of the limit if that is less."""
ENDLESS = 10**6
"""Times that a job may be queued again. A job without progress gives up by itself."""
START = (
    f"import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [{WARNING:d}]); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
PYTHON = f"{shlex.quote(sys.executable)} -ISc {shlex.quote(START)}"
"""Starts Python with WARNING blocked, because it would end a job that still imports. ResumableJob unblocks it."""
ENDED_BY_WARNING = ("code=$?", f"[ $code -ne {128 + WARNING} ] || scontrol requeue $SLURM_JOB_ID", "exit $code")
"""Lines after the job in SLURM's script. They queue a job again that WARNING ended before Python could block it."""


WorkType = TypeVar("WorkType", bound=Work)


@dataclass(frozen=True)
class ChainJob(Generic[WorkType]):
    """A job to submit. The jobs in `after` must succeed before it starts."""

    title: str
    folder: Path
    work: WorkType
    after: tuple["ChainJob[WorkType]", ...] = ()

    @property
    def logs(self) -> Path:
        """The folder of submitit's files, which the chains of a recipe share."""
        return self.folder.parent / "jobs"


def load_submitit() -> ModuleType:
    """Import submitit, and set the signal that it sends. Raises ClusterError if it is not installed."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    try:
        import submitit
    except ImportError as error:
        raise ClusterError("jobs need submitit: pip install 'hpcm-rwkv[cluster]'") from error
    return submitit


def submit_to_slurm(jobs: Sequence[ChainJob], resources: Resources) -> Iterator[tuple[ChainJob, JobRecord]]:
    """Submit the jobs, and yield each with its record. Jobs with the same predecessors form one array.

    Raises ClusterError if SLURM refuses an array. The arrays before it are submitted.
    """
    submitit = load_submitit()
    if shutil.which("srun") is None:
        raise ClusterError("srun: no such command; submit on a machine of the cluster, or here with --submit local")
    ids: dict[ChainJob, str] = {}
    for group in _groups(jobs):
        try:
            executor = submitit.SlurmExecutor(group[0].logs, max_num_timeout=ENDLESS, python=PYTHON)
            executor.update_parameters(**_parameters(group, resources, [ids[job] for job in group[0].after]))
            submitted = executor.submit_array([ResumableJob(job.work) for job in group])
        except RuntimeError as error:  # submitit's error types
            raise ClusterError(f"SLURM refused the jobs: {str(error).strip()}") from error
        for job, sent in zip(group, submitted, strict=True):
            ids[job] = sent.job_id
            record = JobRecord("slurm", sent.job_id)
            ChainJobs.read(job.folder).add(job.folder, record, sent.paths.stdout)
            yield job, record


def _groups(jobs: Sequence[ChainJob]) -> list[list[ChainJob]]:
    """The jobs by their predecessors, in order. A job cannot wait for another job of its array."""
    groups: dict[tuple[Path, tuple[ChainJob, ...]], list[ChainJob]] = {}
    for job in jobs:
        groups.setdefault((job.logs, job.after), []).append(job)
    return list(groups.values())


def _parameters(group: Sequence[ChainJob], resources: Resources, after: Sequence[str]) -> dict[str, object]:
    if resources.minutes is None:
        raise ClusterError("a SLURM job needs a time limit, such as --time 12:00; after it, the job is queued again")
    gpus = 1 if resources.gpus is None else resources.gpus
    options: dict[str, object] = {"requeue": True, "kill-on-invalid-dep": "yes", **resources.sbatch_options()}
    parameters: dict[str, object] = {
        "job_name": f"hpcm {group[0].title if len(group) == 1 else group[0].folder.parent.name}",
        "time": max(1, round(resources.minutes)),
        "nodes": resources.nodes,
        "ntasks_per_node": max(gpus, 1),
        "signal_delay_s": _saving_seconds(resources.minutes),
        "stderr_to_stdout": True,
        "setup": [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}"],
        "teardown": [*ENDED_BY_WARNING],
        "additional_parameters": options,
    }
    if gpus:
        parameters["gpus_per_node"] = gpus
    if resources.partition:
        parameters["partition"] = resources.partition
    if after:
        parameters["dependency"] = "afterok:" + ":".join(after)
    return parameters


def start_locally(job: ChainJob, resources: Resources, gpus: tuple[int, ...]) -> tuple[object, JobRecord]:
    """Start a job on this machine. Returns submitit's job, which must be kept, and the record."""
    submitit = load_submitit()
    minutes = resources.minutes
    executor = submitit.LocalExecutor(job.logs, max_num_timeout=ENDLESS, python=PYTHON)
    executor.update_parameters(
        timeout_min=LONGEST if minutes is None else minutes,
        signal_delay_s=_saving_seconds(minutes) if minutes else 0,
        tasks_per_node=max(len(gpus), 1),
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
        stderr_to_stdout=True,
    )
    with _deaf_children():
        sent = executor.submit(ResumableJob(job.work))
    record = JobRecord("local", sent.job_id, queue=os.getpid())
    ChainJobs.read(job.folder).add(job.folder, record, sent.paths.stdout)
    return sent, record


def _saving_seconds(minutes: float) -> int:
    return max(1, int(min(SAVING_SECONDS, 10 * minutes)))


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Start processes that ignore Ctrl-C and the closing of the terminal, because this process stops them."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
