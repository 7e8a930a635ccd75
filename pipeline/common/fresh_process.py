"""Runs work that may run out of memory, in this process or in a new one."""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import torch

from modules.plugins import load_plugins, loaded_plugins

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def within_memory(call: Callable[[], Result]) -> Result | None:
    """The result of a call; None if it ran out of the memory of the machine or a GPU."""
    try:
        return call()
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises a plain RuntimeError on a CPU; so do cuBLAS and cuDNN.
        named = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
        if not (named or isinstance(error, MemoryError)):
            raise
    torch.cuda.empty_cache()
    return None


def in_fresh_process(
    call: Callable[Arguments, Result], *arguments: Arguments.args, **keywords: Arguments.kwargs
) -> Result | None:
    """The result of a call in a new process; None if it ran out of memory or died. Arguments and result are pickled."""
    plugins = load_plugins, (loaded_plugins(),)
    with ProcessPoolExecutor(1, get_context("spawn"), *plugins) as processes:
        try:
            return within_memory(partial(processes.submit(call, *arguments, **keywords).result))
        except BrokenProcessPool:  # The kernel killed the process for its memory, or it crashed. They look the same.
            return None
