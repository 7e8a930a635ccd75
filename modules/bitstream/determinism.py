"""Settings of PyTorch under which encoder and decoder compute nearly the same values."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_float32(device: torch.device) -> Iterator[None]:
    """Make PyTorch compute scales and means as exactly as float32 allows.

    There is no autocast, no TF32 and no bfloat16 inside products. Algorithms are deterministic and chosen without
    benchmarking. So one machine and build computes identical values for a fixed number of threads: matrix products on a
    CPU split their sums by the number of threads. The settings are restored afterwards.
    """
    backends: Any = torch.backends
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    # General settings come first. A special setting that inherits from them needs no change of its own.
    precisions = backends, cudnn, cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv
    wanted: list[tuple[Any, str, str | bool]] = [(owner, "fp32_precision", "ieee") for owner in precisions]
    wanted += [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    with ExitStack() as settings:
        settings.enter_context(torch.autocast(device.type, enabled=False))
        for owner, name, value in wanted:
            before = getattr(owner, name)
            if before != value:
                settings.callback(setattr, owner, name, before)
                setattr(owner, name, value)
        yield
