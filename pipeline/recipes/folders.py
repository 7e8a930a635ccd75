"""Where the packaged recipes lie; imports nothing, so that the command line starts fast."""

from pathlib import Path

_PIPELINE = Path(__file__).resolve().parents[1]
_INSTALLED = _PIPELINE / "_stages"  # where a wheel keeps what a source tree has in stages/

STAGES = _INSTALLED if _INSTALLED.is_dir() else _PIPELINE.parent / "stages"
"""One folder for each packaged recipe."""

DEFAULTS = "common.yaml"
"""The file of a recipe that holds what its stages have in common."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.parent.name for path in STAGES.glob(f"*/{DEFAULTS}"))


def label(path: Path) -> str:
    """How messages name a recipe's file: `stages/tiny/phase3.yaml` for a packaged one, wherever it is installed."""
    return f"stages/{path.relative_to(STAGES).as_posix()}" if path.is_relative_to(STAGES) else str(path)
