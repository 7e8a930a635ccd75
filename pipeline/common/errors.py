"""What ends a command before its time; imports nothing heavy, so that `hpcm --help` need not wait for PyTorch."""

import signal


class UserError(Exception):
    """Something that a person can mend: the message fits one screen, names it and says what to do."""


class Interrupted(Exception):
    """The run was asked to stop, and saved; `exit_code` is the usual 128 + signal (SIGUSR1 counts as SIGTERM)."""

    def __init__(self, signum: int):
        self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum
        self.exit_code = 128 + self.signum
        super().__init__(f"stopped by {signal.Signals(signum).name}")


class MainProcessStopped(Exception):
    """The first process stopped and said why; this one stops with the same `exit_code`."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__("the first process stopped")


class LostProcess(Exception):
    """Another process of the run is gone."""
