"""Mirrors a chain to MLflow while it runs, so that MLflow's charts are live. Training never waits for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.common.errors import Interrupted, UserError
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.store import Store

PAUSE = 5.0
"""Seconds between two mirrors."""
PATIENCE, PATIENCE_INTERRUPTED = 30.0, 10.0
"""Seconds that the end of a run waits for its last mirror; after a signal, less."""


@contextmanager
def live_mirror(store: Store, note: Callable[[str], None], folder: Path) -> Iterator[None]:
    """Mirror a chain's folder in a thread, every few seconds and once at the end.

    `note` is called when the store stops answering, and when it answers again.
    """
    ended, problem = threading.Event(), ""

    def run() -> None:
        nonlocal problem
        mirror = Mirror(store)
        working = True
        while working:
            working = not ended.wait(PAUSE)
            try:
                mirror.chain(folder, working)
            except UserError as error:
                mirror = Mirror(store)  # It asks again for everything, whatever the store has lost meanwhile.
                if not problem:
                    note(f"{error}; the run goes on, and it is tried again")
                problem = str(error)
            else:
                if problem:
                    note(f"MLflow ({store.shown}) answers again")
                problem = ""

    thread = threading.Thread(target=run, name="mirror", daemon=True)
    thread.start()
    patience = PATIENCE
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        patience = PATIENCE_INTERRUPTED
        raise
    finally:
        ended.set()
        thread.join(patience)
        if thread.is_alive() or problem:
            note("MLflow does not have all of this run yet; `hpcm sync` sends the rest")
