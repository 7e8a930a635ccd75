"""The build of the Bi-WKV4 kernels: cached, and safe in parallel. If it fails, a warning and the reference."""

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.biwkv4 import build as biwkv4_build
from modules.biwkv4.op import biwkv4, biwkv4_reference

ROOT = Path(__file__).parents[2]
CALL = "import torch; from modules.biwkv4.op import biwkv4; x = torch.ones(1, 3, 2); w = torch.zeros(2); "


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    counter = tmp_path / "builds"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo build >> "{counter}"\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(compiler)}
    processes = [run(CALL + "print(biwkv4(w, w, x, x).sum().item())", **environment) for _ in range(3)]
    for process in processes:
        out, error = process.communicate()
        assert (out, process.returncode) == ("6.0\n", 0), error
        assert "slow" not in error
    assert counter.read_text() == "build\n"
    folder = tmp_path / "cache" / "hpcm_biwkv4"
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]


@pytest.mark.parametrize(
    ("compiler", "cause"), [("/nowhere/c++", "cannot run"), ("false", "failed"), ("true", "No such file")]
)
def test_no_build_is_one_warning_and_the_reference(tmp_path: Path, compiler: str, cause: str) -> None:
    code = CALL + "k = x.clone().requires_grad_(); [biwkv4(w, w, k, x).sum().backward() for _ in range(3)]"
    code += "; print(k.grad.abs().max().item() < 1e-6, biwkv4(w, w, x, x).sum().item())"
    process = run(code, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX=compiler)
    out, error = process.communicate()
    assert (out, process.returncode) == ("True 6.0\n", 0), error
    assert error.count("RuntimeWarning: Bi-WKV4 falls back to its slow PyTorch reference") == 1
    assert cause in error


class Builds:
    """In the place of a build: makes a file that holds `content`, under the name of its digest, and counts."""

    def __init__(self, content: bytes = b"a library") -> None:
        self.content, self.count = content, 0

    def __call__(self, source: str, command: list[str], cache: Path, name: str) -> Path:
        self.count += 1
        path = cache / f"{name}_{hashlib.sha256(self.content).hexdigest()[:16]}.so"
        path.unlink(missing_ok=True)
        path.write_bytes(self.content)
        return path


def test_a_damaged_library_is_built_again_and_a_strangers_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = Builds()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(biwkv4_build, "_run_ninja", builds)
    library = biwkv4_build.build_cpu()
    assert (biwkv4_build.build_cpu(), builds.count) == (library, 1)
    for damaged in (b"", b"a lib", b"a librarx"):
        library.write_bytes(damaged)
        assert biwkv4_build.build_cpu().read_bytes() == builds.content
    assert builds.count == 4
    library.chmod(0o777)
    biwkv4_build.build_cpu()
    assert builds.count == 5
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert not biwkv4_build.build_cpu().is_symlink()
    library.parent.chmod(0o777)
    biwkv4_build.build_cpu()
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o755
    os.chown(library.parent, 4711, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(biwkv4_build.BuildError, match="belongs to another user"):
        biwkv4_build.build_cpu()


def test_without_kernels_the_op_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biwkv4_build, "cpu_kernels", lambda: None)
    w, u = torch.randn(4), torch.randn(4)
    leaves = [x.requires_grad_() for x in (w, u, torch.randn(2, 11, 4), torch.randn(2, 11, 4))]
    results = []
    for op in (biwkv4, biwkv4_reference):
        y = op(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_cache_knows_what_shapes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(biwkv4_build, "_run_ninja", Builds())
    first = biwkv4_build.build_cpu()
    assert biwkv4_build.build_cpu() == first
    monkeypatch.setattr(biwkv4_build, "CPU_FLAGS", (*biwkv4_build.CPU_FLAGS, "-g"))
    second = biwkv4_build.build_cpu()
    monkeypatch.setattr(biwkv4_build, "_cpu_identity", lambda: "another machine")
    third = biwkv4_build.build_cpu()
    monkeypatch.setattr(torch, "__version__", "0")
    fourth = biwkv4_build.build_cpu()
    sources = shutil.copytree(biwkv4_build.SOURCES, tmp_path / "cuda")
    monkeypatch.setattr(biwkv4_build, "SOURCES", sources)
    assert biwkv4_build.build_cpu() == fourth
    builds = {first, second, third, fourth}
    files = sorted(path for path in sources.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    for path in files:
        path.open("a").write("// changed\n")
        builds.add(biwkv4_build.build_cpu())
    assert len(builds) == 4 + len(files)


@pytest.mark.parametrize("header", sorted(biwkv4_build.SOURCES.rglob("*.h")), ids=lambda path: path.name)
def test_each_header_compiles_alone(header: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-include", str(header), "-x", "c++", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_building_ahead_is_what_the_op_will_load() -> None:
    process = run("import runpy; runpy.run_module('modules.biwkv4.build', run_name='__main__')")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.splitlines()[0] == str(biwkv4_build.build_cpu())


def test_architectures_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0a+PTX")
    assert biwkv4_build.cuda_architectures() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere")
    with pytest.raises(biwkv4_build.BuildError, match="Ampere"):
        biwkv4_build.cuda_architectures()
