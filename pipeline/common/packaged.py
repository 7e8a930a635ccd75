"""Where the packaged recipes and weights lie; imports nothing, so that the command line starts fast."""

from pathlib import Path

_PIPELINE = Path(__file__).resolve().parents[1]
_INSTALLED = _PIPELINE / "_stages"  # where a wheel keeps what a source tree has in stages/

STAGES = _INSTALLED if _INSTALLED.is_dir() else _PIPELINE.parent / "stages"
"""One folder for each packaged recipe."""

WEIGHTS = STAGES / "evidence" / "weights"
"""The packaged weights, and their model card."""

DEFAULTS = "common.yaml"
"""The file of a recipe that holds what its stages have in common."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.parent.name for path in STAGES.glob(f"*/{DEFAULTS}"))


def stage_names(recipe: str) -> list[str]:
    """Names of a recipe's stages, by its name or its folder's path; none where there is no such recipe."""
    folder = STAGES / recipe if recipe in recipe_names() else Path(recipe)
    return sorted(path.stem for path in folder.glob("*.yaml") if path.name != DEFAULTS)


def label(path: Path) -> str:
    """How messages name a recipe's file: `stages/tiny/phase3.yaml` for a packaged one, wherever it is installed."""
    return f"stages/{path.relative_to(STAGES).as_posix()}" if path.is_relative_to(STAGES) else str(path)
