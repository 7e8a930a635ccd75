"""Mirrors a chain to MLflow while it runs, so that MLflow's charts are live. Training never waits for it."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.common.errors import Interrupted, UserError
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store

PAUSE = 5.0
"""Seconds between two mirrors."""
PATIENCE, PATIENCE_INTERRUPTED = 30.0, 10.0
"""Seconds that the end of a run waits for its last mirror; after a signal, less."""


class LiveMirror:
    """A thread that mirrors a chain's folder every few seconds, and once at the end.

    `note` is called when the store stops answering, and when it answers again.
    """

    def __init__(self, store: Store, note: Callable[[str], None], folder: Path):
        self.store, self.note, self.folder = store, note, folder
        self._mirror = Mirror(store)
        self.tries = 0
        """How often it has begun to mirror."""
        self._problem = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

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
        while not self._ended.wait(PAUSE):
            self._bring(working=True)
        self._bring(working=False)

    def _bring(self, working: bool) -> None:
        self.tries += 1
        try:
            self._mirror.chain(self.folder, working)
        except UserError as error:
            self._mirror = Mirror(self.store)  # It asks again for everything, whatever the store has lost meanwhile.
            if not self._problem:
                self._problem = str(error)
                self.note(f"{error}; the run goes on, and it is tried again")
        else:
            if self._problem:
                self._problem = ""
                self.note(f"MLflow ({self.store.shown}) answers again")
