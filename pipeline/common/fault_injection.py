"""Places where a test can kill the process: `HPCM_FAULT=write.partial:3` kills it at the third call for that place.

The signal is SIGKILL; `HPCM_FAULT_SIGNAL` sets the number of another one.
"""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault(place: str) -> None:
    """Send this process the signal if the environment asks for it at this place and call."""
    wanted = os.environ.get("HPCM_FAULT")
    if wanted is None:
        return
    _passed[place] += 1
    if wanted == f"{place}:{_passed[place]}":
        os.kill(os.getpid(), int(os.environ.get("HPCM_FAULT_SIGNAL", signal.SIGKILL)))
