"""Exceptions that end a command early. This module imports nothing heavy, so `hpcm --help` starts fast."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A problem that the user can fix. The message fits one screen, names the problem and says what to do."""


@contextmanager
def raised_as(kind: type[Exception], caught: type[Exception] = ValueError, prefix: str = "") -> Iterator[None]:
    """Raise errors of the class `caught` as errors of the class `kind`, with a prefix before their messages."""
    try:
        yield
    except caught as error:
        raise kind(f"{prefix}{error}") from error


class Interrupted(Exception):
    """The run saved its state and stopped on a signal; `exit_code` is 128 + signal (SIGUSR1 counts as SIGTERM)."""

    def __init__(self, signum: int):
        self.received = signum
        self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum
        self.exit_code = 128 + self.signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class MainProcessStopped(Exception):
    """The first process stopped and reported why; this process stops with the same `exit_code`."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__("the first process stopped")


class LostProcess(Exception):
    """Another process of the run has died."""
