"""Places where a test may kill the process: `HPCM_FAULT=state.partial:3` at the third pass of that place."""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault(place: str) -> None:
    """Die here, as by SIGKILL, where the environment asks for it."""
    wanted = os.environ.get("HPCM_FAULT")
    if wanted is None:
        return
    _passed[place] += 1
    if wanted == f"{place}:{_passed[place]}":
        os.kill(os.getpid(), signal.SIGKILL)
