"""Who may import whom: the codec nothing of the pipeline, nor what only the pipeline needs."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"torch", "compressai", "einops", "numpy"}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports, other than the standard library's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", sorted((ROOT / "modules").glob("*.py")), ids=lambda path: path.name)
def test_modules_know_nothing_of_the_pipeline(path: Path) -> None:
    assert imported(path) <= OUTSIDE | {"modules"}


def test_cuda_holds_no_python() -> None:
    suffixes = {path.suffix for path in (ROOT / "cuda").iterdir()}
    assert suffixes
    assert suffixes <= {".h", ".cpp", ".cu", ".md"}
