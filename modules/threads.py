"""How the threads of a CPU operation wait for each other.

While OpenMP's threads wait, they spin by default. On a shared machine they then take the core from the thread that they
wait for, and an operation can take several times as long. OpenMP reads its policy once, when PyTorch is imported.
"""

import os
import sys
import warnings


def wait_without_spinning() -> None:
    """Let threads sleep while they wait. Warns if PyTorch was imported before and the machine has other load."""
    if "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    threads = getattr(sys.modules.get("torch"), "get_num_threads", lambda: 1)()
    if threads > 1 and os.getloadavg()[0] >= 1:
        warnings.warn(
            "this machine has other load, and PyTorch was imported before this package, so its threads spin while they "
            "wait: each operation may take several times as long. Import this package before torch, or set "
            "OMP_WAIT_POLICY=PASSIVE in the environment.",
            RuntimeWarning,
            stacklevel=3,
        )
