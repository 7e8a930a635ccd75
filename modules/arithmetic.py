"""Arithmetic that comes out the same in encoder and decoder."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

MOST_THREADS = min(os.cpu_count() or 1, 255)
"""Of what a file may ask: where threads cannot be had, their library ends the process."""


@contextmanager
def coding_arithmetic(device: torch.device, threads: int) -> Iterator[None]:
    """Settings under which one machine and build compute the same scales and means for encoder and decoder.

    Float32 throughout (no autocast, no TF32, no bfloat16 inside products), deterministic algorithms chosen without
    trials, and `threads` threads: matrix products on a CPU divide their sums by that number.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with ExitStack() as settings:
        settings.callback(torch.set_num_threads, before[0])
        settings.callback(torch.set_float32_matmul_precision, before[1])
        settings.enter_context(torch.autocast(device.type, enabled=False))
        settings.enter_context(
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        )
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        yield
