"""Mirrors a chain to MLflow while it runs, so that MLflow's charts are live. Training never waits for it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.common.errors import Interrupted
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store, brief

PAUSE = 5.0
"""Seconds between two mirrors."""
PATIENCE, PATIENCE_INTERRUPTED = 30.0, 10.0
"""Seconds that the end of a run waits for its last mirror; after a signal, less."""


class LiveMirror:
    """A thread that mirrors a chain's folder every few seconds, and once at the end."""

    def __init__(self, store: Store, note: Callable[[str], None], folder: Path):
        self.store, self.note, self.folder = store, note, folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._problem = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(PATIENCE_INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else PATIENCE)
        if self._thread.is_alive() or self._problem:
            self.note("MLflow does not have all of this run yet; `hpcm sync` sends the rest")

    def _run(self) -> None:
        mirror = Mirror(self.store)
        while not self._ended.wait(PAUSE):
            self._try(mirror, running=True)
        # A fresh mirror looks at everything once more, whatever the store did with it.
        deadline = time.monotonic() + PATIENCE
        while not self._try(Mirror(self.store), running=False) and time.monotonic() < deadline:
            time.sleep(1)

    def _try(self, mirror: Mirror, running: bool) -> bool:
        """Mirror once. Tells when it begins to fail, and when it works again."""
        try:
            mirror.chain(self.folder, running)
        except Exception as error:  # MLflow passes on the errors of its backends, and training must go on.
            if not self._problem:
                self._problem = brief(error)
                self.note(f"MLflow ({self.store.shown}): {self._problem}; the run goes on, and it is tried again")
            return False
        if self._problem:
            self._problem = ""
            self.note(f"MLflow ({self.store.shown}) answers again")
        return True
