"""Build the C++ and CUDA sources of `cuda/` with ninja on first use, and cache the libraries.

A change of the sources, the compiler, its flags or the processor leads to a new build. `python -m modules.native_build`
builds all libraries for this machine ahead of time.

`torch.utils.cpp_extension.load` is not used. It would load a damaged library, one that another user could have written,
and one that was compiled for another processor. In PyTorch 2.11 it waits forever if an earlier build was killed
(github.com/pytorch/pytorch/issues/189245).
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_INSTALLED = Path(__file__).resolve().parent / "_cuda"  # a wheel's copy of cuda/
SOURCES = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "cuda"
COMMON_FLAGS = ("-O3", "-std=c++17", "-shared")
CPU_FLAGS = ("-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
CUDA_FLAGS = ("-Xcompiler", "-fPIC", "-cudart", "static", "--threads", "0")


class BuildError(RuntimeError):
    """A library cannot be built on this machine. The message says why."""


def build_cpu(name: str) -> Path:
    """Return the path of the library of `cuda/cpu/NAME.cpp`; build it unless it is cached.

    Raises BuildError with the compiler's message.
    """
    compiler = os.environ.get("CXX", "").split() or [_first_of("c++", "g++", "clang++")]
    tuning = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return _build(f"cpu/{name}.cpp", [*compiler, *COMMON_FLAGS, *CPU_FLAGS, tuning], _cpu_identity())


def build_cuda(name: str) -> Path:
    """The same for `cuda/gpu/NAME.cu`, built for `TORCH_CUDA_ARCH_LIST` or the GPUs present."""
    roots = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"
    nvcc = _first_of(*(f"{root}/bin/nvcc" for root in roots if root), "nvcc")
    return _build(f"gpu/{name}.cu", [nvcc, *COMMON_FLAGS, *CUDA_FLAGS, *cuda_architectures()], "")


def cuda_architectures() -> list[str]:
    """nvcc's flags for the architectures to build for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    present = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    names = listed or " ".join(f"{major}.{minor}" for major, minor in sorted(present))
    wanted = re.findall(r"(\d+)\.(\d+[af]?)(\+PTX)?", names)
    if not wanted and listed:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={listed!r} has no architecture of the form 8.0 or 9.0+PTX")
    if not wanted:
        raise BuildError("no GPU was found; to build for one, set TORCH_CUDA_ARCH_LIST, for example to 9.0")
    flags = []
    for major, minor, ptx in wanted:
        codes = [f"sm_{major}{minor}"] + ([f"compute_{major}{minor}"] if ptx else [])
        flags += [f"-gencode=arch=compute_{major}{minor},code={code}" for code in codes]
    return flags


def _build(source: str, command: Sequence[str], identity: str) -> Path:
    """Compile one source into a library in the cache. Processes that need it at the same time wait for the first."""
    texts = [path.read_bytes() for path in sorted(SOURCES.rglob("*")) if path.suffix in (".h", ".cpp", ".cu")]
    if not texts:
        raise BuildError(f"there are no sources in {SOURCES}; reinstall the package")
    facts = [*command, _run([command[0], "--version"]), identity]
    key = hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in facts)])).hexdigest()[:16]
    cache, name = _cache(), f"{Path(source).name.replace('.', '_')}_{key}"
    found = _cached(cache, name)
    if found is None:
        with (cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _cached(cache, name) or _compile(source, command, cache, name)
    return found


def _cached(cache: Path, name: str) -> Path | None:
    """Find the library of this name whose digest matches its file name and that no other user could have written."""
    for path in cache.glob(f"{name}_*.so"):
        status = path.lstat()
        own = stat.S_ISREG(status.st_mode) and status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022
        if own and path.stem == f"{name}_{_digest(path)}":
            return path
    return None


def _compile(source: str, command: Sequence[str], cache: Path, name: str) -> Path:
    """Run ninja in a temporary folder of the cache, then rename, so that an incomplete library is never loaded."""
    # The environment's scripts come first: ninja is installed there, and the environment may not be activated.
    ninja = _first_of(f"{sysconfig.get_path('scripts')}/ninja", "ninja")
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}_") as folder:
        built, escaped = Path(folder, "built.so"), re.sub(r"([$ :])", r"$\1", str(SOURCES / source))
        rule = f"rule library\n  command = {' '.join(command)} $in -o $out\n"
        Path(folder, "build.ninja").write_text(f"{rule}build {built.name}: library {escaped}\n")
        _run([ninja, "-C", folder])
        built.chmod(0o755)
        for damaged in cache.glob(f"{name}_*.so"):
            damaged.unlink()
        return built.rename(cache / f"{name}_{_digest(built)}.so")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _cache() -> Path:
    """The folder of built libraries, to which only its owner may write. Raises BuildError if there is none."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given or Path.home() / ".cache") / "hpcm_native"
    except RuntimeError as error:  # In some containers the user has no home folder.
        raise BuildError(f"{error} Set TORCH_EXTENSIONS_DIR to a folder of your own") from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()):
        raise BuildError(f"{folder} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of your own")
    if status.st_mode & 0o022:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    return folder


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout


def _first_of(*programs: str) -> str:
    found = next((path for program in programs if (path := shutil.which(program))), None)
    if found is None:
        raise BuildError(f"{' or '.join(programs)} was not found; install it")
    return found


def _cpu_identity() -> str:
    """The processor's features, which `native` stands for. Machines with other processors may share the cache."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in ("flags", "Features")}))


if __name__ == "__main__":
    print(*(build_cpu(path.stem) for path in sorted(SOURCES.glob("cpu/*.cpp"))), sep="\n")
    if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        print(*(build_cuda(path.stem) for path in sorted(SOURCES.glob("gpu/*.cu"))), sep="\n")
