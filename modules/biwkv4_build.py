"""Build and load the Bi-WKV4 kernels of `cuda/`: by ninja, on first use, cached by all that shapes them."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent.parent / "cuda"
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
CPU_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message is the cause."""


class Call(ctypes.Structure):
    """`BiwkvCall` of `cuda/biwkv4_call.h`, field by field."""

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
    """A loaded library: each function takes a `Call` and returns a status, 0 for success."""

    forward: Callable[[Call], int]
    backward: Callable[[Call], int]


@functools.cache
def cpu_kernels() -> Kernels | None:
    """The CPU kernels, built if need be; None, after one warning with the cause, if they cannot be."""
    return _or_warning(lambda: _load(build_cpu()))


def build_cpu() -> Path:
    """The CPU library's path, built now unless cached. Raises BuildError with the compiler's message."""
    compiler = os.environ.get("CXX") or _first_of("c++", "g++", "clang++")
    tuning = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return _build(
        "cpu",
        "biwkv4_cpu.cpp",
        (*compiler.split(), *CPU_FLAGS, "-ffp-contract=fast", tuning),
        _cpu_identity(),
    )


def parallel_for() -> int:
    """Address of PyTorch's own parallel loop, so that the kernels use its threads; 0 if it has none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _or_warning(load: Callable[[], Kernels]) -> Kernels | None:
    try:
        return load()
    except (BuildError, OSError) as error:
        warnings.warn(f"Bi-WKV4 runs as its slow PyTorch reference: {error}", RuntimeWarning, stacklevel=3)
        return None


def _load(library: Path) -> Kernels:
    loaded = ctypes.CDLL(str(library))
    for name in ("biwkv4_forward", "biwkv4_backward"):
        function = getattr(loaded, name)
        function.argtypes, function.restype = [ctypes.POINTER(Call)], ctypes.c_int
    return Kernels(loaded.biwkv4_forward, loaded.biwkv4_backward)


def _build(kind: str, source: str, command: Sequence[str], identity: str) -> Path:
    """Compile one source into a library of the cache; processes that ask at once wait for the first."""
    texts = [p.read_bytes() for p in sorted(SOURCES.glob("*.*"))]
    if not texts:
        raise BuildError(f"the sources are not at {SOURCES}")
    version = _run([command[0], "--version"])
    facts = [*command, version, identity, torch.__version__]
    key = hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in facts)])).hexdigest()[:16]
    library = _cache() / f"biwkv4_{kind}_{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / f"{library.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _run_ninja(source, command, library)
    return library


def _run_ninja(source: str, command: Sequence[str], library: Path) -> None:
    """Build beside the cache's entry, then rename: a killed build leaves nothing that could be loaded."""
    ninja = _first_of("ninja")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f"{library.stem}_") as folder:
        escaped = str(SOURCES / source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        rule = f"rule library\n  command = {' '.join(command)} $in -o $out\n"
        (Path(folder) / "build.ninja").write_text(f"{rule}build {library.name}: library {escaped}\n")
        _run([ninja, "-C", folder])
        (Path(folder) / library.name).replace(library)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


def _first_of(*programs: str) -> str:
    # The environment's own folder first: ninja comes with it, and it need not be activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
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
    print(build_cpu(), file=sys.stderr)
