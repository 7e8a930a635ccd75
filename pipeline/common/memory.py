"""Memory that this process may use, so that what cannot fit is refused before it is asked for."""

import os
import resource
from contextlib import suppress
from pathlib import Path

SHARE = 0.5
"""Part of the memory that one image, or one file, may take."""


def memory_limit() -> int:
    """Bytes that this process may use: the machine's, or fewer where a control group or `ulimit -v` says so."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` where there is none.
            limits.append(int(Path(name).read_text()))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)


def too_large(bytes_: float) -> str:
    """Why so many bytes are refused; empty where they are not."""
    allowed = SHARE * memory_limit()
    if bytes_ <= allowed:
        return ""
    return f"needs {bytes_ / 1e9:.1f} GB of memory; {allowed / 1e9:.1f} GB, half of what there is, are allowed"
