"""The wheel: it holds all that the source tree uses, and works from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = {"modules": "modules", "pipeline": "pipeline", "stages": "pipeline/_stages", "cuda": "modules/_cuda"}
"""Folders of the source tree, and where a wheel has them."""
SUFFIXES = {".py", ".html", ".yaml", ".h", ".cpp", ".cu", ".sbatch"}
WEIGHTS = ROOT / "stages" / "evidence" / "weights"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: setuptools would leave its own copies in `build/`, old files too."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in MAPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", target]
    subprocess.run(command, check=True, timeout=120)
    (built,) = target.glob("hpcm_rwkv-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_all_that_the_source_tree_uses(unpacked: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / name).as_posix()}"
        for name, target in MAPPED.items()
        for path in (ROOT / name).rglob("*")
        if path.is_file() and (path.suffix in SUFFIXES or path.is_relative_to(WEIGHTS))
    }
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    found = {name for name in files if ".dist-info/" not in name}
    assert found == expected
    tops = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert tops == {"modules", "pipeline"}  # `cuda` is NVIDIA's, and `stages` may be anybody's
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))


def run(folder: Path, python: str, *arguments: str, **environment: str) -> str:
    """What Python prints, started in `folder`."""
    command = [python, *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_package_finds_recipes_weights_and_kernel_sources(unpacked: Path, tmp_path: Path) -> None:
    code = """if True:
        from modules.native_build import SOURCES
        from pipeline.weights.shipped import DEFAULT
        from pipeline.common.packaged import label, recipe_names
        from pipeline.recipes.loading import STAGES, load_recipe
        print(SOURCES.is_dir(), DEFAULT.is_file(), label(STAGES / "tiny" / "phase3.yaml"))
        print(*(name for name in recipe_names() if load_recipe(name).stages))
        print(SOURCES, DEFAULT, STAGES, sep="\\n")"""
    found, names, *folders = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=str(unpacked)).splitlines()
    assert found == "True True stages/tiny/phase3.yaml"
    assert names.split() == sorted(path.parent.name for path in ROOT.glob("stages/*/common.yaml"))
    assert all(Path(folder).is_relative_to(unpacked.resolve()) for folder in folders)


@pytest.mark.slow
def test_an_environment_with_the_wheel_alone_builds_the_range_coder_and_codes(wheel: Path, tmp_path: Path) -> None:
    from PIL import Image
    from skimage.data import coffee

    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    run(tmp_path, python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    # The dependencies, not installed again: they are gigabytes. After the environment's own packages on the path.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (work := tmp_path / "work").mkdir()
    Image.fromarray(coffee()[:128, :192]).save(work / "photo.png")

    hpcm = str(tmp_path / "venv" / "bin" / "hpcm")
    cache = str(tmp_path / "cache")
    run(work, python, "-W", "error::RuntimeWarning", hpcm, "compress", "photo.png", XDG_CACHE_HOME=cache)
    assert list((tmp_path / "cache" / "hpcm_native").glob("range_coder_*.so"))
    assert "192×128" in run(work, python, hpcm, "decompress", "photo.hpcm", "-o", "decoded.png", XDG_CACHE_HOME=cache)
    assert "baseline" in run(work, python, hpcm, "plan", "phase4", "--recipe", "tiny")
