"""The jobs of a chain: their record in the chain's folder, and their states on the cluster."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.cluster.resources import ClusterError
from pipeline.common.contracts import read_contract
from pipeline.common.files import write_json

TAIL = 2**16
"""Bytes at the end of a log that are searched for the last line."""
ENGINES = re.compile(r"srun: |submitit (INFO|WARNING)|slurmstepd.* DUE TO JOB REQUEUE")
"""Lines that SLURM and submitit add to a log. They say nothing about the work."""

JobState = Literal["queued", "running", "ended"]


@dataclass(frozen=True)
class JobRecord:
    """One job, as it was submitted."""

    cluster: Literal["slurm", "local"]
    id: str
    """SLURM's job number, or the process on this machine; empty while a local job waits for a device."""
    log: str = ""
    """The job's log, relative to the chain's folder."""
    queue: int = 0
    """The process of `hpcm` that starts the local jobs."""

    def state(self, slurm: Mapping[str, str]) -> tuple[JobState, str]:
        """The job's state, and the reason why it waits. `slurm` is the result of `slurm_queue`."""
        if self.cluster == "local":
            if self.id:
                return ("running" if _alive(int(self.id), b"submitit") else "ended"), ""
            return ("queued", "waits for a device") if _alive(self.queue, b"") else ("ended", "")
        state, _, reason = slurm.get(self.id, "").partition("|")
        if not state:
            return "ended", ""
        if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
            return "queued", reason
        return "running", ""


@dataclass(frozen=True)
class ChainJobs:
    """Contents of `jobs.json` in a chain's folder: the jobs of the last submission."""

    jobs: tuple[JobRecord, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "ChainJobs":
        """Read the record of a chain's folder. Raises FileError if it is damaged."""
        path = folder / "jobs.json"
        return read_contract(cls, path) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        """Write the record into a chain's folder. Raises FileError."""
        write_json(folder / "jobs.json", asdict(self))

    def add(self, folder: Path, job: JobRecord, log: Path | None) -> "ChainJobs":
        """Add a job with a link to its log, drop the job that waited for a device, and write the record."""
        if log is not None:
            link = folder / "logs" / f"{job.cluster}-{job.id}.log"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path("../..") / log.absolute().relative_to(folder.parent.absolute()))
            job = replace(job, log=link.relative_to(folder).as_posix())
        added = ChainJobs((*(known for known in self.jobs if known.id), job))
        added.write(folder)
        return added


@dataclass(frozen=True)
class JobStatus:
    """The state of a chain, from all its jobs."""

    state: JobState | Literal["none"]
    ids: str
    """The jobs that are queued or running; the last job if all have ended."""
    waits: str
    """Why the job waits."""
    last_line: str
    """Last line of the last log; empty while a job runs."""


def status_of(folder: Path, slurm: Mapping[str, str]) -> JobStatus:
    """The status of the jobs of the chain in `folder`."""
    jobs = ChainJobs.read(folder).jobs
    states = [(job, *job.state(slurm)) for job in jobs]
    for wanted in ("running", "queued"):
        alive = [(job, waits) for job, state, waits in states if state == wanted]
        if alive:
            ids = ", ".join(filter(None, (job.id for job, _ in alive)))
            return JobStatus("running" if wanted == "running" else "queued", ids, alive[0][1], "")
    if not jobs:
        return JobStatus("none", "", "", "")
    return JobStatus("ended", jobs[-1].id, "", last_line(folder / jobs[-1].log) if jobs[-1].log else "")


def slurm_queue(jobs: Iterable[JobRecord]) -> dict[str, str]:
    """`state|reason` of this user's SLURM jobs that have not ended, by job number. Raises ClusterError.

    squeue works on every cluster. sacct, which submitit uses, works only on clusters that keep accounts.
    """
    if not any(job.cluster == "slurm" for job in jobs):
        return {}
    if shutil.which("squeue") is None:
        raise ClusterError("squeue: no such command; repeat the command on a machine of the cluster")
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise ClusterError(f"squeue: {answer.stderr.strip()}")
    return dict(line.split("|", 1)[0:2] for line in answer.stdout.splitlines() if "|" in line)


def last_line(log: Path) -> str:
    """The last line of a job's log, if possible one that the job itself printed; empty if there is no line."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not ENGINES.match(line)), lines[-1] if lines else "")


def _alive(process: int, command: bytes) -> bool:
    """Whether this process runs and its command line contains `command`. Process numbers are reused."""
    try:
        return command in Path(f"/proc/{process}/cmdline").read_bytes() and "\nState:\tZ" not in (
            Path(f"/proc/{process}/status").read_text()
        )
    except OSError:
        return False
