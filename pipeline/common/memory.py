"""The memory limit of this process, so that what is too large is refused before allocation, and its peak."""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

SHARE = 0.5
"""Share of the memory that one image or file may take."""


def memory_limit() -> int:
    """Bytes that this process may use: the machine's memory, or a lower limit of a control group or `ulimit -v`."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # `max` means no limit.
            limits.append(int(Path(name).read_text()))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
    return min(limits)


def too_large(bytes_: float) -> str:
    """The reason why `bytes_` are refused, or "" if they are allowed."""
    allowed = SHARE * memory_limit()
    if bytes_ <= allowed:
        return ""
    return f"needs {bytes_ / 1e9:.1f} GB of memory; at most {allowed / 1e9:.1f} GB (half of the limit) is allowed"


def largest_resident_size() -> int:
    """Peak resident size in bytes. On Linux this is VmHWM, because ru_maxrss includes the parent process's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
