"""The build of libraries: cached, and safe in parallel. If Bi-WKV4's fails, a warning and the reference."""

import functools
import hashlib
import os
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from modules import native_build as build
from modules.biwkv4 import kernels
from modules.biwkv4.op import biwkv4, biwkv4_reference


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    counter, compiler = tmp_path / "builds", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo build >> "{counter}"\nexec c++ "$@" -O0\n')
    compiler.chmod(0o755)
    code = "from modules.native_build import build_cpu; print(build_cpu('range_coder'))"
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    processes = [
        subprocess.Popen(command, cwd=build.SOURCES.parent, env=environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    first, second = (process.communicate()[0].decode().strip() for process in processes)
    assert first == second
    assert Path(first).is_file()
    assert counter.read_text() == "build\n"
    folder = tmp_path / "cache" / "hpcm_native"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


@pytest.mark.parametrize(
    ("compiler", "cause"), [("/nowhere/c++", "cannot run"), ("false", "failed"), ("true", "No such file")]
)
def test_a_failed_build_gives_one_warning_and_the_reference(
    compiler: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(kernels, "cpu_kernels", functools.cache(kernels.cpu_kernels.__wrapped__))
    leaves = [torch.randn(shape, requires_grad=True) for shape in (4, 4, (2, 11, 4), (2, 11, 4))]

    def results(op: Callable[..., Tensor]) -> list[Tensor]:
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    with pytest.warns(RuntimeWarning, match=f"falls back to its slow PyTorch reference: .*{cause}") as warned:
        found = [results(biwkv4) for _ in range(2)]
    assert len(warned) == 1
    for one in found:
        torch.testing.assert_close(one, results(biwkv4_reference))


class Builds:
    """Replaces `_compile`: makes a file that holds `content`, under the name of its digest, and counts."""

    def __init__(self, content: bytes = b"a library") -> None:
        self.content, self.count = content, 0

    def __call__(self, source: str, command: list[str], cache: Path, name: str) -> Path:
        self.count += 1
        path = cache / f"{name}_{hashlib.sha256(self.content).hexdigest()[:16]}.so"
        path.unlink(missing_ok=True)
        path.write_bytes(self.content)
        return path


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builds:
    """An empty cache, and a build that compiles nothing."""
    builds = Builds()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_compile", builds)
    return builds


def test_a_damaged_library_is_rebuilt_and_another_users_is_not_loaded(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build.build_cpu("biwkv4")
    assert (build.build_cpu("biwkv4"), builds.count) == (library, 1)
    for damaged in (b"", b"a lib", b"a librarx"):
        library.write_bytes(damaged)
        assert build.build_cpu("biwkv4").read_bytes() == builds.content
    assert builds.count == 4
    library.chmod(0o777)
    build.build_cpu("biwkv4")
    assert builds.count == 5
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert not build.build_cpu("biwkv4").is_symlink()
    library.parent.chmod(0o777)
    build.build_cpu("biwkv4")
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o755
    os.chown(library.parent, 4711, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build.build_cpu("biwkv4")
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    for variable in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(build.BuildError, match=r"home directory\. Set TORCH_EXTENSIONS_DIR"):
        build.build_cpu("biwkv4")


def test_flags_processor_and_each_source_lead_to_a_new_build(
    builds: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [build.build_cpu("biwkv4")]
    monkeypatch.setattr(build, "CPU_FLAGS", (*build.CPU_FLAGS, "-g"))
    libraries.append(build.build_cpu("biwkv4"))
    monkeypatch.setattr(build, "_cpu_identity", lambda: "another machine")
    libraries.append(build.build_cpu("biwkv4"))
    sources = shutil.copytree(build.SOURCES, tmp_path / "cuda")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.build_cpu("biwkv4") == libraries[-1]
    files = [path for path in sources.rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    for path in files:
        path.open("a").write("// changed\n")
        libraries.append(build.build_cpu("biwkv4"))
    assert len(set(libraries)) == 3 + len(files)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_building_ahead_makes_all_libraries_that_are_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("modules.native_build", run_name="__main__")
    built = [str(build.build_cpu(name)) for name in ("biwkv4", "range_coder")]
    assert capsys.readouterr().out.splitlines()[:2] == built


def test_architectures_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0a+PTX")
    assert build.cuda_architectures() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(build.BuildError, match="Ampere"):
        build.cuda_architectures()
