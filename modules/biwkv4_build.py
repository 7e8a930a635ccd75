"""Build and load the Bi-WKV4 kernels of `cuda/`: by ninja, on first use, cached by all that shapes them.

`python -m modules.biwkv4_build` builds ahead what this machine can use.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.kernel_sources import SOURCES

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
COMMON_FLAGS = ("-O3", "-std=c++17", "-shared")
CPU_FLAGS = ("-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
CUDA_FLAGS = ("-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "0")


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message is the cause."""


class Call(ctypes.Structure):
    """`BiwkvCall` of `cuda/shared/abi.h`, field by field."""

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
    """A loaded library: each function takes a pointer to a `Call`; a status of 0 is success."""

    forward: Callable[..., int]
    backward: Callable[..., int]
    runner: int = 0  # CPU: address of PyTorch's own parallel loop, 0 for one thread
    workspace: Callable[..., int] | None = None  # CUDA: bytes that a call needs on the device
    explain: Callable[[int], str] = lambda status: f"status {status}"


@functools.cache
def cpu_kernels() -> Kernels | None:
    """The CPU kernels, built if need be; None, after one warning with the cause, if they cannot be."""
    return _or_warning(lambda: _load_cpu(build_cpu()))


@functools.cache
def cuda_kernels() -> Kernels | None:
    """The CUDA kernels for the GPUs present, likewise."""
    return _or_warning(lambda: _load_cuda(build_cuda()))


def build_cpu() -> Path:
    """The CPU library's path, built now unless cached. Raises BuildError with the compiler's message."""
    compiler = os.environ.get("CXX", "").split() or [_first_of("c++", "g++", "clang++")]
    tuning = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return _build("cpu", "cpu/biwkv4.cpp", [*compiler, *COMMON_FLAGS, *CPU_FLAGS, tuning], _cpu_identity())


def build_cuda() -> Path:
    """The CUDA library's path, for `TORCH_CUDA_ARCH_LIST` or the GPUs present, built now unless cached."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = _first_of("nvcc", folders=[f"{root}/bin" for root in [*roots, "/usr/local/cuda"] if root])
    return _build("cuda", "gpu/biwkv4.cu", [nvcc, *COMMON_FLAGS, *CUDA_FLAGS, *cuda_architectures()], "")


def cuda_architectures() -> list[str]:
    """nvcc's flags for the architectures to build for."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        wanted = re.findall(r"(\d+)\.(\d+[af]?)(\+PTX)?", listed)
        if not wanted:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed!r} names no architecture such as 8.0 or 9.0+PTX")
    else:
        devices = range(torch.cuda.device_count())
        wanted = sorted({(*map(str, torch.cuda.get_device_capability(i)), "") for i in devices})
        if not wanted:
            raise BuildError("there is no GPU to build for, and TORCH_CUDA_ARCH_LIST is not set")
    flags = []
    for major, minor, ptx in wanted:
        codes = [f"sm_{major}{minor}"] + ([f"compute_{major}{minor}"] if ptx else [])
        flags += [f"-gencode=arch=compute_{major}{minor},code={code}" for code in codes]
    return flags


def _or_warning(load: Callable[[], Kernels]) -> Kernels | None:
    try:
        return load()
    except (BuildError, OSError) as error:
        warnings.warn(f"Bi-WKV4 runs as its slow PyTorch reference: {error}", RuntimeWarning, stacklevel=3)
        return None


def _load(library: Path) -> Any:
    loaded = ctypes.CDLL(str(library))
    for name in ("biwkv4_forward", "biwkv4_backward"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Call)]
    return loaded


def _load_cpu(library: Path) -> Kernels:
    loaded = _load(library)
    return Kernels(loaded.biwkv4_forward, loaded.biwkv4_backward, runner=_parallel_for())


def _load_cuda(library: Path) -> Kernels:
    loaded = _load(library)
    loaded.biwkv4_workspace.argtypes = [ctypes.POINTER(Call), ctypes.c_int]
    loaded.biwkv4_workspace.restype = ctypes.c_int64
    loaded.biwkv4_error.restype = ctypes.c_char_p
    return Kernels(
        loaded.biwkv4_forward,
        loaded.biwkv4_backward,
        workspace=loaded.biwkv4_workspace,
        explain=lambda status: loaded.biwkv4_error(status).decode(),
    )


def _parallel_for() -> int:
    """PyTorch's own loop over threads, so that the kernels follow torch.set_num_threads and add no pool."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _build(kind: str, source: str, command: Sequence[str], identity: str) -> Path:
    """Compile one source into a library of the cache; processes that ask at once wait for the first."""
    texts = [path.read_bytes() for path in sorted(SOURCES.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]
    if not texts:
        raise BuildError(f"the sources are not at {SOURCES}")
    version = _run([command[0], "--version"])
    facts = [*command, version, identity, torch.__version__]
    key = hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in facts)])).hexdigest()[:16]
    cache, name = _private(_cache()), f"biwkv4_{kind}_{key}"
    found = _cached(cache, name)
    if found is None:
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _cached(cache, name) or _run_ninja(source, command, cache, name)
    return found


def _cached(cache: Path, name: str) -> Path | None:
    """The library of this name, if its content is what its file's name says, and nobody else could have written it."""
    for path in cache.glob(f"{name}_*.so"):
        status = path.lstat()
        own = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022
        if own and path.stem == f"{name}_{_digest(path)}":
            return path
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _private(folder: Path) -> Path:
    """The folder, made if need be; raises BuildError where another user could put libraries there."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()):
        raise BuildError(f"{folder} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of your own")
    if status.st_mode & 0o022:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    return folder


def _run_ninja(source: str, command: Sequence[str], cache: Path, name: str) -> Path:
    """Build beside the cache's entry, then rename: what was cut off, or is not whole on disk, is never loaded."""
    ninja = _first_of("ninja")
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}_") as folder:
        escaped = re.sub(r"([$ :])", r"$\1", str(SOURCES / source))
        rule = f"rule library\n  command = {' '.join(command)} $in -o $out\n"
        (Path(folder) / "build.ninja").write_text(f"{rule}build {name}.so: library {escaped}\n")
        _run([ninja, "-C", folder])
        built = Path(folder) / f"{name}.so"
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.chmod(0o755)
        for damaged in cache.glob(f"{name}_*.so"):
            damaged.unlink()
        return built.rename(cache / f"{name}_{_digest(built)}.so")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


def _first_of(*programs: str, folders: Sequence[str] = ()) -> str:
    # The environment's own folder too: ninja comes with it, and it need not have been activated.
    path = os.pathsep.join([*folders, sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = next((where for program in programs if (where := shutil.which(program, path=path))), None)
    if found is None:
        raise BuildError(f"none of {', '.join(programs)} is on PATH")
    return found


def _cache() -> Path:
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder) / "hpcm_biwkv4"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpcm_biwkv4"


def _cpu_identity() -> str:
    """What `native` means here: a home directory may be shared by machines with different processors."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features")}))


if __name__ == "__main__":
    print(build_cpu())
    if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        print(build_cuda())
