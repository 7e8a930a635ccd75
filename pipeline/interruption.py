"""Signals: the first asks for a save after the current step, a second ends the process at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was asked to stop, and saved; `exit_code` is the usual 128 + signal (SIGUSR1 counts as SIGTERM)."""

    def __init__(self, signum: int):
        self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum
        self.exit_code = 128 + self.signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class Interruption:
    """While entered, remembers the first signal, so that work stops where it can be continued."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.signum = 0
        self._previous: dict[int, Any] = {}

    def agreed(self) -> int:
        """The signal that any process received (0 for none): the same answer for all, who must all ask."""
        if self.accelerator.num_processes == 1:
            return self.signum
        mine = torch.tensor([self.signum], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    def stop_if_asked(self) -> None:
        """Raise Interrupted if this process received a signal; for work that one process does alone."""
        if self.signum:
            raise Interrupted(self.signum)

    def __enter__(self) -> "Interruption":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(Interrupted(signum).exit_code)
        self.signum = signum
