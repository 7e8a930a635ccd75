"""The work of a job without a codec. It counts in a file, and saves after a signal."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import Interrupted


@dataclass(frozen=True)
class Counting:
    """Counts to `until` in `file`, one number every `pause` seconds. A signal stops it between two numbers."""

    file: Path
    until: int
    pause: float = 0.0
    fails: str = ""
    """An error that ends the work."""
    idle: bool = False
    """Whether nothing is saved."""

    def run(self) -> None:
        heard: list[int] = []
        before = {n: signal.signal(n, lambda signum, _: heard.append(signum)) for n in (signal.SIGUSR1, signal.SIGTERM)}
        with self.rounds.open("a") as rounds:
            rounds.write(f"{os.getpid()}\n")
        number = int(self.progress())
        try:
            while number < self.until:
                time.sleep(self.pause)
                number += 1
                if self.fails:
                    raise SystemExit(f"error: {self.fails}")
                if not self.idle:
                    self.file.write_text(f"{number}")
                if heard:
                    raise Interrupted(heard[0])
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)

    def progress(self) -> str:
        return self.file.read_text() if self.file.exists() else "0"

    @property
    def rounds(self) -> Path:
        """A file with the process number of each round, written once the round handles signals."""
        return self.file.with_suffix(".rounds")


@dataclass(frozen=True)
class WarnedEarly(Counting):
    """Counts, but its first job gets the time limit's signal while it is still loaded."""

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if not self.warned.exists():
            self.warned.touch()
            os.kill(os.getpid(), signal.SIGUSR1)

    @property
    def warned(self) -> Path:
        """A file that exists once the signal was sent."""
        return self.file.with_suffix(".warned")
