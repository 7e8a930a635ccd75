"""The differences between a published stage and what its recipe asks for now."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import RecipeError, read_text, shown
from pipeline.weights.published import Lineage

MOST = 4
"""Most changed settings that a message lists."""
_ABSENT = object()


def changed_inputs(lineage: Lineage, inputs: Mapping[str, str], stage: Stage) -> str:
    """The names of the inputs that differ, as in `parent changed, recipe changed (seed: 0 → 1)`."""
    known = lineage.inputs
    changed = ", ".join(
        f"{name} changed" if name in known and name in inputs else f"{name} is {'new' if name in inputs else 'gone'}"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    )
    if "recipe changed" in changed and (by_key := recipe_changes(lineage.stage or "", stage)):
        changed = changed.replace("recipe changed", f"recipe changed ({by_key})")
    return changed


def recipe_changes(text: str, stage: Stage) -> str:
    """The settings that make a stage published with this YAML stale, as `data.batch_size: 8 → 4`; empty if unknown."""
    try:
        published = Stage.model_validate(read_text(text, "stage.yaml").plain())
    except (RecipeError, ValidationError):  # Published by a version with other settings.
        return ""
    found = list(_differences(_by_name(published), _by_name(stage), ""))
    return ", ".join([*found[:MOST], *([f"and {len(found) - MOST} more"] if len(found) > MOST else [])])


def _by_name(stage: Stage) -> dict[str, Any]:
    """The settings that influence the weights, with segments by name."""
    fields = stage.influences()
    return {**fields, "schedule": {segment["name"]: segment for segment in fields["schedule"]}}


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    mappings = isinstance(before, dict) and isinstance(now, dict)
    if mappings and not path.endswith(".lr"):  # The order of rates matters.
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(key, _ABSENT), now.get(key, _ABSENT), f"{path}.{key}".lstrip("."))
    elif before != now or (mappings and list(before) != list(now)):
        shown_values = ("none" if x is _ABSENT else x if isinstance(x, str) else shown(x) for x in (before, now))
        yield f"{path}: {' → '.join(shown_values)}"
