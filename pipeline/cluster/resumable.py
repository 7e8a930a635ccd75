"""A job that is resumed. It saves before its time limit, and the cluster queues it again."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.common.errors import Interrupted

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

WARNING = signal.SIGUSR1
"""The signal that announces the time limit."""
IDLE_ROUNDS = 2
"""Rounds in a row without progress that a job may have. After one more it gives up."""
PAUSE = 5.0
"""Seconds between attempts to queue a job again while SLURM's controller does not answer."""


class Work(Protocol):
    """The work of a job. It is pickled when the job is submitted."""

    def run(self) -> None:
        """Do the work. Raises Interrupted after a signal, once everything is saved, and SystemExit after an error."""

    def progress(self) -> str:
        """A text that changes whenever the saved work changes."""


@dataclass
class ResumableJob:
    """A job that submitit calls once in each process, and again after each time limit."""

    work: Work
    idle: int = 0
    """Rounds in a row without progress."""

    def __call__(self) -> None:
        """Do the work. Exits with 128 + signal if the job was stopped, and returns if the work is complete."""
        _join_processes()
        # A warning that came during the start of Python is handled here: the job is queued again.
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [WARNING])
        except subprocess.SubprocessError:
            _queue_again()
        before = self.work.progress()
        try:
            self.work.run()
        except Interrupted as stop:
            print(f"{stop}; saved", file=sys.stderr, flush=True)
            if stop.received != WARNING:
                sys.exit(stop.exit_code)
            if self.work.progress() != before:
                self.idle = -1
            if self.idle == IDLE_ROUNDS:
                sys.exit(f"error: {IDLE_ROUNDS + 1} rounds brought no progress; give the job a longer --time")
            _queue_again()
            sys.exit(0)  # Only the first process queues the job again.

    def checkpoint(self) -> "DelayedSubmission | None":
        """The job that submitit queues next; None to give up. It is also called before the work begins."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(ResumableJob(self.work, self.idle + 1)) if self.idle < IDLE_ROUNDS else None


def _queue_again() -> None:
    """Call submitit's handler of WARNING, which queues the job again and exits in the first process."""
    while True:
        try:
            return signal.raise_signal(WARNING)
        except subprocess.SubprocessError:
            print("SLURM's controller does not answer; trying again", file=sys.stderr, flush=True)
            time.sleep(PAUSE)


def _join_processes() -> None:
    """Tell PyTorch which of the job's processes this is."""
    import submitit

    environment = submitit.JobEnvironment()
    if environment.cluster == "local":
        os.setsid()  # Then Ctrl-C at the terminal reaches only the queue, which stops each job once.
    # Until the work handles signals, scancel may end the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if environment.num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
