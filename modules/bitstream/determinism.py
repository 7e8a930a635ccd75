"""Settings of PyTorch under which encoder and decoder compute the same values."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

MOST_THREADS = min(os.cpu_count() or 1, 255)
"""The most threads that a file of version 1 may request. OpenMP aborts if it cannot create them."""


@contextmanager
def coding_arithmetic(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Make PyTorch compute scales and means as exactly as float32 allows.

    All arithmetic is float32 (no autocast, no TF32, no bfloat16 inside products). Algorithms are deterministic and
    chosen without benchmarking. With a fixed `threads`, one machine and build always compute identical values: matrix
    products on a CPU split their sums by the number of threads.
    """
    backends: Any = torch.backends
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    # General settings come first. A special setting that inherits from them needs no change of its own.
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
