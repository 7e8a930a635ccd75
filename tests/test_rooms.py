"""Imports: which rooms and packages each room may import, and that files do not import each other in a circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"torch", "compressai", "einops", "numpy", "safetensors", "huggingface_hub"}
"""Packages that `modules/` may use. The last two save and load codecs (`modules/pretrained.py`)."""

MODULES = (
    "threads.py",
    "plugins.py",
    "compressai_parts.py",
    "image_checks.py",
    "native_build.py",
    "biwkv4",
    "layers",
    "context",
    "config.py",
    "estimator.py",
    "network.py",
    "refinement.py",
    "bitstream",
    "saved_codec.py",
    "loading.py",
    "pretrained.py",
    "codec.py",
    "image_codec.py",
    "target_codec.py",
    "compressai_tools.py",
)
"""The rooms of `modules/`. Each imports only itself and those before it."""

STRICT = ("modules", "pipeline")
"""The packages without circles, with all imports at the top of their files."""

BELOW = {
    "common": "",
    "recipes": "",
    "data": "",
    "weights": "",
    "evaluation": "weights data recipes",
    "records": "evaluation weights data",
    "tracking": "records evaluation weights data",
    "training": "tracking records evaluation data weights recipes",
    "chain": "training tracking records evaluation weights data recipes",
    "evidence": "training tracking records evaluation weights data recipes",
    "commands": "evidence chain training tracking records evaluation weights data recipes",
}
"""The rooms of `pipeline/` that each of them may import beside itself and `common`."""


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports: at its head, inside functions and only for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, other than the standard library's."""
    return {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)


def rooms(path: Path) -> set[str]:
    """Rooms of the pipeline that a file imports from."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("pipeline.")}


def files_of(package: str) -> list[Path]:
    """The files of a package, but not its own `__init__.py`."""
    top = ROOT / package
    return [path for path in sorted(top.rglob("*.py")) if path != top / "__init__.py"]


def file_of(name: str) -> Path | None:
    """The file of this project that a dotted name is imported from."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def test_modules_import_neither_the_pipeline_nor_other_packages() -> None:
    assert {path.name: extra for path in files_of("modules") if (extra := packages(path) - OUTSIDE - {"modules"})} == {}


def test_each_room_of_modules_imports_only_the_rooms_before_it() -> None:
    for path in files_of("modules"):
        rank = MODULES.index(path.relative_to(ROOT / "modules").parts[0])
        for name in imported(path):
            if name.split(".")[0] == "modules":
                target = file_of(name)
                assert target is not None, f"{path}: {name}"
                room = target.relative_to(ROOT / "modules").parts[0]
                assert room in MODULES[: rank + 1], f"{path} imports {name}"


def circle_in(arrows: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", STRICT)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    arrows = {path: {file for name in imported(path) if (file := file_of(name))} - {path} for path in files_of(package)}
    assert circle_in(arrows) == []


@pytest.mark.parametrize("package", STRICT)
def test_imports_stand_at_the_top_of_their_file(package: str) -> None:
    for path in files_of(package):
        tree = ast.parse(path.read_text())
        inner = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert [node.lineno for node in inner if node not in tree.body] == [], path


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    allowed = {room, "common", *BELOW[room].split()}
    paths = sorted((ROOT / "pipeline" / room).rglob("*.py"))
    assert len(paths) > 1
    assert {path.name: extra for path in paths if (extra := rooms(path) - allowed)} == {}


def test_every_file_of_the_pipeline_is_in_a_room() -> None:
    assert {path.name for path in (ROOT / "pipeline").glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in (ROOT / "pipeline").glob("*/*.py")} == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_a_room_says_what_it_is_and_loads_nothing(room: str) -> None:
    (docstring,) = ast.parse((ROOT / "pipeline" / room / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


def test_cuda_holds_no_python() -> None:
    suffixes = {path.suffix for path in (ROOT / "cuda").rglob("*.*")}
    assert suffixes
    assert suffixes <= {".h", ".cpp", ".cu", ".md"}
