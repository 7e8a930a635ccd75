"""Arithmetic that comes out the same in encoder and decoder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

MOST_THREADS = min(os.cpu_count() or 1, 255)
"""Upper limit on the threads a file of version 1 may request; OpenMP aborts where threads cannot be created."""


@contextmanager
def coding_arithmetic(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Settings under which encoder and decoder compute scales and means as exactly as float32 allows.

    Float32 throughout (no autocast, no TF32, no bfloat16 inside products) and deterministic algorithms chosen without
    trials. With `threads` threads one machine and build compute the very same values: matrix products on a CPU divide
    their sums by that number.
    """
    backends: Any = torch.backends
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    # From the general to the special: what is not set for itself follows, and need not be set and put back.
    precisions = backends, cudnn, cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv
    wanted: list[tuple[Any, str, str | bool]] = [(owner, "fp32_precision", "ieee") for owner in precisions]
    wanted += [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    with ExitStack() as settings:
        settings.callback(torch.set_num_threads, torch.get_num_threads())
        settings.enter_context(torch.autocast(device.type, enabled=False))
        for owner, name, value in wanted:
            before = getattr(owner, name)
            if before != value:
                settings.callback(setattr, owner, name, before)
                setattr(owner, name, value)
        if threads is not None:
            torch.set_num_threads(threads)
        yield
