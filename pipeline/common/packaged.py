"""Paths of the packaged recipes and weights. This module imports nothing heavy, so the command line starts fast."""

from pathlib import Path

_PIPELINE = Path(__file__).resolve().parents[1]
_INSTALLED = _PIPELINE / "_stages"  # a wheel installs stages/ here

STAGES = _INSTALLED if _INSTALLED.is_dir() else _PIPELINE.parent / "stages"
"""Folder that holds one folder per packaged recipe."""

WEIGHTS = STAGES / "evidence" / "weights"
"""The packaged weights and their model card."""

DEFAULTS = "common.yaml"
"""The file with the defaults of all stages of a recipe."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.parent.name for path in STAGES.glob(f"*/{DEFAULTS}"))


def stage_names(recipe: str) -> list[str]:
    """Stage names of a recipe, which is given by its name or its folder's path; empty if there is no such recipe."""
    folder = STAGES / recipe if recipe in recipe_names() else Path(recipe)
    return sorted(path.stem for path in folder.glob("*.yaml") if path.name != DEFAULTS)


def label(path: Path) -> str:
    """A recipe file's name in messages; packaged files are always `stages/…`, such as `stages/tiny/phase3.yaml`."""
    return f"stages/{path.relative_to(STAGES).as_posix()}" if path.is_relative_to(STAGES) else str(path)
