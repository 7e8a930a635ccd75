"""Loads a recipe: reads a folder of stages, merges defaults and overrides, and checks the whole."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modules.plugins import PluginError, load_installed_plugins, load_plugin
from pipeline.common.errors import raised_as
from pipeline.common.packaged import DEFAULTS, STAGES, label, recipe_names
from pipeline.recipes.schema import Stage
from pipeline.recipes.segment import FORMS
from pipeline.recipes.yaml_source import RecipeError, YamlNode, dotted, merge, nearest, put, read_file, read_text, shown

MOST_LINES = 10
PLUGINS = "plugins"
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
CHAIN_NAMES = ("training", "superseded", "abandoned", "lock", "logs")
"""Names in a chain's folder that are not stages."""
RUNS_NAMES = ("mlartifacts", "comparisons", "report", "mlflow.db", "mlflow.lock", "images.db", "images.lock")
"""Names in a folder of runs that are not recipes."""
ONE_PER_CHAIN = ("lmbda", "precision")
"""Settings that all stages of a chain share: its folder has one λ, and its processes have one precision."""
WORDINGS = {
    "missing": f"missing; expected here or in {DEFAULTS}",
    "too_short": "should have at least {min_length} entries, not {actual_length}",
    "too_long": "should have at most {max_length} entries, not {actual_length}",
    "string_pattern_mismatch": "should be a word of letters, digits, - and _, not {found}",
    "model_type": "should be a mapping of keys and values, not {found}",
    "dict_type": "should be a mapping of keys and values, not {found}",
    "value_error": "{error}",
}


@dataclass(frozen=True)
class Recipe:
    """Stages by name. The parent of each is another stage of the recipe, or None."""

    name: str
    stages: Mapping[str, Stage]
    folder: Path
    sources: Mapping[str, YamlNode]
    """The YAML of each stage, with the file and line of every value."""
    plugins: Mapping[str, Path] = field(default_factory=dict)
    """The files of the modules that the recipe imports, by name."""

    def chain(self, stage_name: str) -> list[Stage]:
        """The stage after all its ancestors, root first. Raises RecipeError if there is no such stage."""
        if stage_name not in self.stages:
            names = list(self.stages)
            hint = nearest(stage_name, names)
            raise RecipeError(f"recipe {self.name} has no stage '{stage_name}'{hint} ({', '.join(names)})")
        stage = self.stages[stage_name]
        return [*(self.chain(stage.parent) if stage.parent else []), stage]


def load_recipe(folder: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read every stage of a recipe, which is given by its name under `stages/` or by its folder's path.

    `common.yaml` gives the defaults, and may list `plugins`, which are imported first. A stage's own file overrides the
    defaults key by key, and lists as a whole. `overrides`, such as `data.crop=128`, override both. Raises RecipeError
    listing the problems, one per line.
    """
    path = _find_folder(folder)
    defaults = read_file(path / DEFAULTS, label(path / DEFAULTS))
    if path.name.lower() in RUNS_NAMES:
        raise RecipeError(f"{label(path)}: {path.name} is a reserved name in the folder of runs; choose another name")
    files = sorted(file for file in path.glob("*.yaml") if file.name != DEFAULTS and file.name[0] != ".")
    if not files:
        raise RecipeError(f"{label(path)}: no stage here; add a YAML file for each stage beside {DEFAULTS}")
    defaults, plugins = _import_plugins(defaults, path)
    trees = {file.stem: merge(defaults, read_file(file, label(file))) for file in files}
    for override in overrides:
        trees |= _overridden(trees, override)

    problems: list[str] = []
    stages: dict[str, Stage] = {}
    for name, tree in trees.items():
        try:
            stages[name] = Stage.model_validate(tree.plain())
        except ValidationError as failure:
            problems += _explain(failure, tree)
        problems += _misplaced(name, trees)
    _report(problems or _cycles(trees))
    recipe = Recipe(path.name, stages, path, trees, plugins)
    _report(_differing_settings(recipe))
    return recipe


def _import_plugins(defaults: YamlNode, folder: Path) -> tuple[YamlNode, dict[str, Path]]:
    """Import listed and installed modules. Returns the other defaults and the modules' files. Raises RecipeError."""
    others = {key: node for key, node in defaults.value.items() if key != PLUGINS}
    listed = defaults.value.get(PLUGINS, YamlNode([], defaults.origin))
    names, where = listed.plain(), f"{listed.origin}: {PLUGINS}"
    if not isinstance(names, tuple) or not all(isinstance(name, str) and MODULE.fullmatch(name) for name in names):
        raise RecipeError(f"{where}: should be a list of names of Python modules, not {shown(names)}")
    with raised_as(RecipeError, PluginError):
        load_installed_plugins()
    with raised_as(RecipeError, PluginError, f"{where}: "):
        return YamlNode(others, defaults.origin), {name: load_plugin(name, folder) for name in names}


def _find_folder(folder: str | Path) -> Path:
    named = STAGES / folder
    if isinstance(folder, str) and named.is_dir() and named.parent == STAGES:
        return named
    if Path(folder).is_dir():
        return Path(folder).resolve()
    names = recipe_names()
    raise RecipeError(
        f"no recipe '{folder}'{nearest(folder, names) or '.'} Use one of {', '.join(names)}, or the path of a "
        f"folder with {DEFAULTS} and a YAML file for each stage"
    )


def _overridden(trees: Mapping[str, YamlNode], override: str) -> dict[str, YamlNode]:
    """The stages that `--set path=value` changes: the path has dotted keys, and list entries by number or name.

    A path that begins with a stage's name applies to that stage. Any other applies to every stage that has the path.
    Raises RecipeError if no stage has it.
    """
    dotted_path, equals, text = override.partition("=")
    head, *rest = path = dotted_path.split(".")
    if not (equals and all(path)):
        raise RecipeError(f"--set {override}: expected key=value, such as --set data.crop=128")
    value = read_text(text, f"--set {override}")
    if rest and head not in trees and head not in Stage.model_fields:
        names = [*trees, *Stage.model_fields]
        raise RecipeError(f"--set {override}: no stage and no setting is called '{head}'{nearest(head, names)}")
    scope, path = ([head], rest) if head in trees and rest else (list(trees), path)
    changed: dict[str, YamlNode] = {}
    refusal = "no stage has a parent to transfer from"
    for name in scope:
        if path[0] == "transfer" and len(scope) > 1 and trees[name].plain().get("parent") is None:
            continue
        try:
            changed[name] = put(trees[name], path, value)
        except RecipeError as problem:
            refusal = str(problem)
    if not changed:
        raise RecipeError(f"--set {override}: {refusal}")
    return changed


def _misplaced(name: str, trees: Mapping[str, YamlNode]) -> list[str]:
    """Problems with the name of a stage and of its parent."""
    tree, fields = trees[name], trees[name].plain()
    same = [other for other in trees if other.lower() == name.lower()]
    parent, problem = fields.get("parent"), ""
    if fields.get("name", name) != name:
        problem = f"should be '{name}', the name of the file"
    elif name.lower() in CHAIN_NAMES:
        problem = f"'{name}' is a reserved name in a chain's folder; choose another name"
    elif len(same) > 1:
        problem = f"{' and '.join(same)} differ only in capitals, and some file systems ignore case; rename one"
    elif isinstance(parent, str) and parent not in trees:
        hint = nearest(parent, list(trees)) or f"; expected one of {', '.join(trees)}, or null"
        return [_line(tree, ["parent"], f"there is no stage {parent!r}{hint}")]
    return [_line(tree, ["name"], problem)] if problem else []


def _cycles(trees: Mapping[str, YamlNode]) -> list[str]:
    """A line about stages that are each other's ancestors, if there are any."""
    parents = {name: [parent] for name, tree in trees.items() if (parent := tree.plain()["parent"])}
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        names = error.args[1]
        return [_line(trees[names[0]], ["parent"], f"the parents form a cycle: {' → '.join(names)}")]
    return []


def _differing_settings(recipe: Recipe) -> list[str]:
    """A line for each setting that differs from the chain's first stage, although a chain can have only one."""
    lines = []
    for name, stage in recipe.stages.items():
        root = recipe.chain(name)[0]
        for key in ONE_PER_CHAIN:
            own, expected = shown(getattr(stage, key)), shown(getattr(root, key))
            if own != expected:
                where = f"{root.name}, {recipe.sources[root.name].origin_of([key])}"
                problem = (
                    f"should be {expected}, as in the chain's first stage ({where}), not {own}; set one {key} for all "
                    f"stages, in {DEFAULTS} or with --set {key}=…"
                )
                lines.append(_line(recipe.sources[name], [key], problem))
    return lines


def _explain(failure: ValidationError, tree: YamlNode) -> list[str]:
    lines = []
    for error in failure.errors(include_url=False):
        if error["type"] == "misfit":
            lines += [_line(tree, path, problem) for path, problem in error["ctx"]["problems"]]
        else:
            path = tuple(key for key in error["loc"] if key not in FORMS)
            lines.append(_line(tree, path, _wording(error, path)))
    return lines


def _line(tree: YamlNode, path: Sequence[str | int], problem: str) -> str:
    return f"{tree.origin_of(path)}: {dotted(path)}: {problem}"


def _wording(error: ErrorDetails, path: tuple[str | int, ...]) -> str:
    """A readable validation error: what was expected, what was found, and the nearest valid value."""
    key, context = str(error["loc"][-1]), error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        if key == PLUGINS:
            return f"belongs in {DEFAULTS}, for all stages"
        valid = _fields(path[:-1])
        return "unknown key" + (nearest(key, valid) or f"; expected one of {', '.join(valid)}")
    if error["type"] in WORDINGS:
        return WORDINGS[error["type"]].format(found=shown(error["input"]), **context)
    hint = nearest(error["input"], context["expected"].split("'")[1::2]) if "expected" in context else ""
    expected = error["msg"].replace("Input should", "should").replace("valid tuple", "list")
    return f"{expected}, not {shown(error['input'])}{hint}"


def _fields(path: tuple[str | int, ...]) -> list[str]:
    """Keys that the schema allows in the mapping at `path`."""
    section: type[BaseModel] = Stage
    for key in path:
        if isinstance(key, str):
            section = _section(section.model_fields[key].annotation)
    return list(section.model_fields)


def _section(annotation: Any) -> type[BaseModel]:
    """The class of the mappings that a field accepts, by themselves, in a list or as one of several forms."""
    nested = (_section(item) for item in get_args(annotation) if item is not Ellipsis)
    return next((found for found in nested if isinstance(found, type) and issubclass(found, BaseModel)), annotation)


def _report(problems: Iterable[str]) -> None:
    lines = list(dict.fromkeys(problems))
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"… and {len(lines) - MOST_LINES} more"]
    if lines:
        raise RecipeError("\n".join(lines))
