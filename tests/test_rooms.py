"""Imports: the codec imports nothing of the pipeline, and each room of the pipeline only the rooms allowed to it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"torch", "compressai", "einops", "numpy", "safetensors", "huggingface_hub"}
"""Packages that `modules/` may use. The last two save and load codecs (`modules/pretrained.py`)."""

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
"""The rooms that each room may import beside itself and `common`."""


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


@pytest.mark.parametrize("path", sorted((ROOT / "modules").rglob("*.py")), ids=lambda path: path.name)
def test_modules_know_nothing_of_the_pipeline(path: Path) -> None:
    assert packages(path) <= OUTSIDE | {"modules"}


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
