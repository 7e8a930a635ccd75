"""The settings that changed since a stage was published, by key."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import RecipeError, read_text, shown

MOST = 4
"""Most changed settings that a message lists."""
_ABSENT = object()


def recipe_changes(text: str, stage: Stage) -> str:
    """The settings that make a published stage stale, as in `data.batch_size: 8 → 4`; empty if they are not known.

    `text` is the published stage's YAML.
    """
    try:
        published = Stage.model_validate(read_text(text, "stage.yaml").plain())
    except (RecipeError, ValidationError):  # Published by a version with other settings.
        return ""
    found = list(_differences(_by_name(published), _by_name(stage), ""))
    more = [f"and {len(found) - MOST} more"] if len(found) > MOST else []
    return ", ".join([*found[:MOST], *more])


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
        yield f"{path}: {_text(before)} → {_text(now)}"


def _text(value: Any) -> str:
    return "none" if value is _ABSENT else value if isinstance(value, str) else shown(value)
