"""The compiled Bi-WKV4 kernels of `cuda/`, built on first use and loaded."""

import ctypes
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.native_build import BuildError, build_cpu, build_cuda

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Call(ctypes.Structure):
    """The same fields as `BiwkvCall` in `cuda/shared/abi.h`."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "length", "channels", "type")],
        *[(name, ctypes.c_void_p) for name in ("w", "u", "k", "v")],
        *[(name, ctypes.c_int64) for name in ("k_batch", "k_time", "v_batch", "v_time")],
        *[(name, ctypes.c_void_p) for name in ("y", "grad_y")],
        *[(name, ctypes.c_int64) for name in ("grad_y_batch", "grad_y_time")],
        *[(name, ctypes.c_void_p) for name in ("grad_w", "grad_u", "grad_k", "grad_v")],
        *[(name, ctypes.c_void_p) for name in ("runner", "workspace")],
    ]


@dataclass(frozen=True)
class Kernels:
    """A loaded library. `forward` and `backward` take a pointer to a `Call` and return a status: 0 is success."""

    forward: Callable[..., int]
    backward: Callable[..., int]
    runner: int = 0  # CPU: address of PyTorch's parallel loop; 0 means one thread
    workspace: Callable[..., int] | None = None  # CUDA: bytes of device memory that a call needs
    explain: Callable[[int], str] = lambda status: f"status {status}"


def _once_or_warned(load: Callable[[], Kernels]) -> Callable[[], Kernels | None]:
    @functools.cache
    @functools.wraps(load)
    def loaded() -> Kernels | None:
        try:
            return load()
        except (BuildError, OSError) as error:
            warnings.warn(f"Bi-WKV4 falls back to its slow PyTorch reference: {error}", RuntimeWarning, stacklevel=3)
            return None

    return loaded


@_once_or_warned
def cpu_kernels() -> Kernels:
    """Load the CPU kernels, built if needed. If that fails, warn once with the cause and return None."""
    loaded = _load(build_cpu("biwkv4"))
    return Kernels(loaded.biwkv4_forward, loaded.biwkv4_backward, runner=_parallel_for())


@_once_or_warned
def cuda_kernels() -> Kernels:
    """Load the CUDA kernels for the GPUs present, in the same way."""
    loaded = _load(build_cuda("biwkv4"))
    loaded.biwkv4_workspace.argtypes = [ctypes.POINTER(Call), ctypes.c_int]
    loaded.biwkv4_workspace.restype = ctypes.c_int64
    loaded.biwkv4_error.restype = ctypes.c_char_p
    return Kernels(
        loaded.biwkv4_forward,
        loaded.biwkv4_backward,
        workspace=loaded.biwkv4_workspace,
        explain=lambda status: loaded.biwkv4_error(status).decode(),
    )


def _load(library: Path) -> Any:
    loaded = ctypes.CDLL(str(library))
    for name in ("biwkv4_forward", "biwkv4_backward"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Call)]
    return loaded


def _parallel_for() -> int:
    """Address of PyTorch's parallel loop. It obeys torch.set_num_threads, so the kernels need no thread pool."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
