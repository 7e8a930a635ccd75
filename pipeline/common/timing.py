"""The time of a single call, and the name of the processor."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, including the GPU work that it started."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def machine(device: str) -> str:
    """The GPU's name, or the CPU's name with the number of threads in use."""
    threads = torch.get_num_threads()
    return processor(device) + (f", {threads} thread{'s' if threads > 1 else ''}" if device.startswith("cpu") else "")


def processor(device: str) -> str:
    """The name of the GPU or CPU."""
    if not device.startswith("cpu"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
