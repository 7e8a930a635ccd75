"""Runs jobs on this machine, as many at a time as its GPUs or cores allow."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pipeline.cluster.records import ChainJobs, JobRecord, last_line
from pipeline.cluster.resources import Resources, places
from pipeline.cluster.resumable import WARNING
from pipeline.cluster.submission import ChainJob, load_submitit, start_locally
from pipeline.common.errors import Interrupted

POLL_SECONDS = 0.5


@dataclass
class _Running:
    job: ChainJob
    sent: Any
    """submitit's job."""
    place: tuple[int, ...]


@dataclass
class LocalQueue:
    """Runs the jobs of one command. Reports each start and each end in one line."""

    resources: Resources
    say: Callable[[str], None]
    succeeded: Callable[[ChainJob], bool]
    """Whether the work of a job that has ended is complete."""
    _stopped_by: int = field(default=0, init=False)
    _running: list[_Running] = field(default_factory=list, init=False)

    def run(self, jobs: Sequence[ChainJob]) -> list[ChainJob]:
        """Run all jobs until they end. Returns those that failed or could not start.

        SIGINT and SIGTERM stop the running jobs. Each job saves, and then Interrupted is raised.
        """
        load_submitit()
        free = places(self.resources.gpus)
        waiting, failed = list(jobs), list[ChainJob]()
        for job in jobs:
            ChainJobs.read(job.folder).add(job.folder, JobRecord("local", "", queue=os.getpid()), None)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self._running or (waiting and not self._stopped_by):
                if not self._stopped_by:
                    waiting = self._start(waiting, free, failed)
                for job in self._reap(free):
                    (waiting if _ran_out_of_rounds(job) else failed).append(job)
                time.sleep(POLL_SECONDS)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._stopped_by:
            raise Interrupted(self._stopped_by)
        return failed

    def _start(self, waiting: list[ChainJob], free: list[tuple[int, ...]], failed: list[ChainJob]) -> list[ChainJob]:
        """Start the jobs that can start. Returns those that still wait."""
        left = []
        busy = {running.job.folder for running in self._running}
        for job in waiting:
            if any(before in failed for before in job.after):
                self.say(f"{job.title}: not started, because a job that must run before it failed")
                failed.append(job)
            elif free and job.folder not in busy and not any(b in waiting or self._runs(b) for b in job.after):
                place = free.pop(0)
                sent, record = start_locally(job, self.resources, place)
                self._running.append(_Running(job, sent, place))
                busy.add(job.folder)
                where = f" on GPU {', '.join(map(str, place))}" if place else ""
                self.say(f"{job.title}: started{where}; log in {job.folder / 'logs' / f'local-{record.id}.log'}")
            else:
                left.append(job)
        return left

    def _reap(self, free: list[tuple[int, ...]]) -> list[ChainJob]:
        """Free the places of the jobs that have ended. Returns those that failed."""
        failed = []
        for running in [running for running in self._running if running.sent.done()]:
            self._running.remove(running)
            free.append(running.place)
            done = self.succeeded(running.job)
            reason = "" if done else f": {last_line(running.sent.paths.stdout)}"
            self.say(f"{running.job.title}: {'done' if done else 'stopped' if self._stopped_by else 'failed'}{reason}")
            if not done:
                failed.append(running.job)
        return failed

    def _runs(self, job: ChainJob) -> bool:
        return any(running.job == job for running in self._running)

    def _stop(self, signum: int, _frame: object) -> None:
        self._stopped_by = signum
        for running in self._running:
            with suppress(OSError):
                os.kill(int(running.sent.job_id), signal.SIGTERM)


def _ran_out_of_rounds(job: ChainJob) -> bool:
    """Whether a job only stopped at its time limit. submitit resumes a local job a few times at most."""
    log = job.folder / ChainJobs.read(job.folder).jobs[-1].log
    return last_line(log).startswith(f"stopped by {WARNING.name}")
