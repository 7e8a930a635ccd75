"""Places where a test may stop the process: `HPCM_FAULT=write.partial:3` kills it at the third pass of that place.

`HPCM_FAULT_SIGNAL` names another signal than SIGKILL by its number.
"""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault(place: str) -> None:
    """Send this process the signal here, where the environment asks for it."""
    wanted = os.environ.get("HPCM_FAULT")
    if wanted is None:
        return
    _passed[place] += 1
    if wanted == f"{place}:{_passed[place]}":
        os.kill(os.getpid(), int(os.environ.get("HPCM_FAULT_SIGNAL", signal.SIGKILL)))
