"""Signals and processes: the first signal asks for a save after the current step, a second ends the process at once."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from pipeline.common.errors import Interrupted, LostProcess, MainProcessStopped, UserError
from pipeline.common.timing import processor


class ProcessesDiffer(UserError):
    """Processes that see other files, or run other programs; the message says what differs."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start_accelerator(precision: str) -> Accelerator:
    """The processes of this run, as `accelerate launch` started them, or the one."""
    # The others wait while the first evaluates, which can take long; that one of them has died, they notice.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(mixed_precision=precision, kwargs_handlers=[patient])


def environment_of(accelerator: Accelerator) -> dict[str, str]:
    """What changes the rounding of a training step: the same settings give the same bytes only where this is equal."""
    return {
        "PyTorch": torch.__version__,
        "device": processor(str(accelerator.device)),
        "threads": str(torch.get_num_threads()),
        "processes": str(accelerator.num_processes),
    }


class ProcessGroup:
    """While entered, remembers the first signal, so that work stops where it can be continued."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def agreed_signal(self) -> int:
        """The signal that any process received (0 for none): the same answer for all, who must all ask."""
        if self.accelerator.num_processes == 1:
            return self.signum
        mine = torch.tensor([self.signum], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def stop_if_asked(self) -> None:
        """Raise Interrupted if this process received a signal; for work that one process does alone."""
        if self.signum:
            raise Interrupted(self.signum)

    def on_main_process(self, work: Callable[[], None]) -> None:
        """Let the first process do something that all wait for; where it raises, all stop."""
        error: BaseException | None = None
        if self.accelerator.is_main_process:
            try:
                work()
            except BaseException as problem:
                error = problem
        if self.accelerator.num_processes > 1:
            told = [getattr(error, "exit_code", 1) if error else 0]
            broadcast_object_list(told)
            if told[0] and error is None:
                raise MainProcessStopped(told[0])
        if error is not None:
            raise error

    def agree_on(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raise ProcessesDiffer, in all processes, unless all give the same facts."""
        if self.accelerator.num_processes == 1:
            return
        every = gather_object([dict(facts())])
        differing = [name for name in every[0] if len({other.get(name) for other in every}) > 1]
        if differing:
            lines = [
                f"  {name}: {'; '.join(f'process {n} has {other.get(name)}' for n, other in enumerate(every, 1))}"
                for name in differing
            ]
            raise ProcessesDiffer("\n".join(["the processes would not train on the same:", *lines]))

    @contextmanager
    def noticing_lost_processes(self) -> Iterator[None]:
        """Raise LostProcess for what torch raises when another process of the run has died."""
        try:
            yield
        except RuntimeError as error:  # DistBackendError of NCCL is one, and Gloo raises nothing more exact.
            if self.accelerator.num_processes == 1 or not _tells_of_a_lost_process(error):
                raise
            index, count = self.accelerator.process_index, self.accelerator.num_processes
            raise LostProcess(
                f"process {index + 1} of {count} stops, because another one is gone ({str(error).strip()[:160]}).\n"
                "  The last saved state is kept; the same command, with any number of processes, goes on from there."
            ) from error

    def __enter__(self) -> "ProcessGroup":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        # To the system's own handling, which does not wait until a long operation returns to Python.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(
        sign in str(error) for sign in ("gloo", "Gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")
    )
