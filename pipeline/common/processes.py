"""Signals and processes. The first signal saves and stops after the current step; a second stops at once."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object, reduce
from torch import Tensor

from pipeline.common.errors import Interrupted, LostProcess, MainProcessStopped, UserError


class ProcessesDiffer(UserError):
    """The processes of a run have different files or software; the message lists the differences."""


Result = TypeVar("Result")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start_accelerator(precision: str, cpu: bool = False) -> Accelerator:
    """Connect the processes that `accelerate launch` started; without it there is one process.

    It trains on a GPU if there is one, unless `cpu` is true. Variables of the environment do not change the weights.
    """
    # The others wait while the first process evaluates, which can take long. They notice a dead process sooner.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, dynamo_backend="no", kwargs_handlers=[patient])
    accelerator.gradient_accumulation_steps = 1  # The recipe divides batches; this would also divide the loss.
    return accelerator


def _launcher() -> int | None:
    """The parent process if it is `accelerate launch`, which ends at a signal without passing it on."""
    try:
        return os.getppid() if b"accelerate" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes() else None
    except OSError:
        return None


class ProcessGroup:
    """The processes of a run. Its context records the first signal, so work can stop at a resumable point."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._signum = 0
        self._launcher = _launcher()
        self._previous: dict[int, Any] = {}

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which evaluates, publishes and writes records."""
        return self.accelerator.is_main_process

    @property
    def signum(self) -> int:
        """The first signal, or 0. The end of `accelerate launch` counts as SIGTERM."""
        return self._signum or (signal.SIGTERM if self._launcher not in (None, os.getppid()) else 0)

    def agreed_signal(self) -> int:
        """A signal that any process received, or 0. All processes must call this; all get the same answer."""
        if self.accelerator.num_processes == 1:
            return self.signum
        mine = torch.tensor([self.signum], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def stop_together(self) -> None:
        """Raise Interrupted in all processes if any of them received a signal. All processes must call this."""
        if signum := self.agreed_signal():
            raise Interrupted(signum)

    def stop_if_asked(self) -> None:
        """Raise Interrupted if this process received a signal. Use it in work that one process does alone."""
        if self.signum:
            raise Interrupted(self.signum)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give the tensors the values that they have in the first process. All processes must call this."""
        self._exchange(tensors, broadcast)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by their means over the processes. All processes must call this."""
        self._exchange(tensors, partial(reduce, reduction="mean"))

    @torch.no_grad()
    def _exchange(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], Tensor]) -> None:
        """Exchange the values of tensors without gaps in their memory, in one flat tensor."""
        if self.accelerator.num_processes > 1:
            flat = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]
            torch._foreach_copy_(flat, exchange(torch.cat(flat)).split([*map(len, flat)]))

    def on_main_process(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the first process, and return its result in all processes. If it raises, all processes stop."""
        outcome: list[Any] = [0, None]
        error: BaseException | None = None
        if self.is_main:
            try:
                outcome[1] = work()
            except BaseException as problem:
                error = problem
                outcome[0] = getattr(problem, "exit_code", 1)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if error is not None:
            raise error
        if outcome[0]:
            raise MainProcessStopped(outcome[0])
        result: Result = outcome[1]
        return result

    def agree_on(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raise ProcessesDiffer in all processes unless `facts` returns the same in each."""
        if self.accelerator.num_processes == 1:
            return
        every = gather_object([dict(facts())])
        differing = [name for name in every[0] if len({other.get(name) for other in every}) > 1]
        if differing:
            lines = [
                f"  {name}: {'; '.join(f'process {n} has {other.get(name)}' for n, other in enumerate(every, 1))}"
                for name in differing
            ]
            raise ProcessesDiffer("\n".join(["the processes differ; make them equal in:", *lines]))

    @contextmanager
    def noticing_lost_processes(self) -> Iterator[None]:
        """Turn the error that torch raises after another process has died into LostProcess."""
        try:
            yield
        except RuntimeError as error:  # NCCL raises a subclass, DistBackendError; Gloo raises RuntimeError itself.
            if self.accelerator.num_processes == 1 or not _means_lost_process(error):
                raise
            index, count = self.accelerator.process_index, self.accelerator.num_processes
            raise LostProcess(
                f"process {index + 1} of {count} stops because another process has died ({str(error).strip()[:160]}).\n"
                "  The last saved state is kept. Run the same command, with any number of processes, to resume from it."
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
        self._signum = signum
        # Restore the default handlers: they act at once, even while a long operation runs outside Python.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def _means_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(
        sign in str(error) for sign in ("gloo", "Gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")
    )
