"""YAML data with the file and line of every value."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.errors import UserError

DEEPEST = 20
LARGEST = 2**24
"""Maximum size of a recipe's file, in bytes."""


class RecipeError(UserError):
    """A recipe that cannot be used; the message fits one screen and says what to change."""


class Misfit(RecipeError):
    """A value of a stage does not fit the codec or another value. `path` leads to it in the stage."""

    def __init__(self, problem: str, *path: str | int):
        super().__init__(f"{dotted(path)}: {problem}")
        self.problem, self.path = problem, path


@dataclass(frozen=True)
class YamlNode:
    """A mapping, list or scalar with its origin: `stages/tiny/phase3.yaml:7`, or `--set seed=3`."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The value without origins, with lists as tuples."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return tuple(child.plain() for child in self.value)
        return self.value

    def origin_of(self, path: Sequence[str | int]) -> str:
        """Where the value at `path` was written; if it is absent, the origin of the nearest enclosing value."""
        children = dict(enumerate(self.value)) if isinstance(self.value, list) else self.value
        if path and isinstance(children, dict) and path[0] in children:
            return children[path[0]].origin_of(path[1:])
        return self.origin


def located(misfit: Misfit, source: YamlNode | None, stage: str, *prefix: str | int) -> str:
    """A message that names the file and line of a value that does not fit, or the stage if they are not known."""
    path = (*prefix, *misfit.path)
    return f"{source.origin_of(path) if source else stage}: {dotted(path)}: {misfit.problem}"


def dotted(path: Sequence[str | int]) -> str:
    """A path in messages: `schedule[1].lr.rwkv`; a key with other characters has quotes, as in `lr['h_a.*']`."""
    text = "".join(f".{key}" if isinstance(key, str) and re.fullmatch(r"[\w-]+", key) else f"[{key!r}]" for key in path)
    return text.removeprefix(".")


def nearest(word: object, valid: Sequence[str]) -> str:
    """The hint `; did you mean 'seed'?`, or "" if no valid word is close."""
    close = get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(value: object) -> str:
    """A value as JSON, cut after 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def merge(base: YamlNode, over: YamlNode) -> YamlNode:
    """Merge `over` into `base`: mappings are merged key by key, any other value is replaced."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = {key: merge(base.value[key], child) if key in base.value else child for key, child in over.value.items()}
    return YamlNode(base.value | merged, over.origin)


def put(node: YamlNode, path: Sequence[str], value: YamlNode) -> YamlNode:
    """Replace the value at `path`, where a list entry is given by its number or `name`.

    Missing mappings along the path are created. Raises RecipeError if a list has no such entry, or if the path
    leads into a scalar.
    """
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node.value, list):
        index = _entry(node, head)
        items = [*node.value[:index], put(node.value[index], rest, value), *node.value[index + 1 :]]
        return YamlNode(items, node.origin)
    if not (isinstance(node.value, dict) or node.value is None):
        raise RecipeError(f"the value {shown(node.value)} ({node.origin}) has no key '{head}'")
    children = node.value or {}
    child = put(children.get(head, YamlNode({}, value.origin)), rest, value)
    return YamlNode(children | {head: child}, node.origin)


def _entry(node: YamlNode, head: str) -> int:
    names = [item.value.get("name") if isinstance(item.value, dict) else None for item in node.value]
    words = [str(name.value) if name else "" for name in names]
    if head.isdecimal() and int(head) < len(words):
        return int(head)
    if head in words:
        return words.index(head)
    known = ", ".join(filter(None, words)) or "no names"
    raise RecipeError(f"no entry '{head}' in this list of {len(words)} ({known}){nearest(head, words)}")


def read_file(path: Path, label: str) -> YamlNode:
    """Read a YAML mapping; `label` names the file in origins and messages."""
    if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):
        raise RecipeError(f"{label}: not a regular file, or too large for a recipe")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = problem.object.count(b"\n", 0, problem.start) + 1
        raise RecipeError(f"{label}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as problem:
        raise RecipeError(f"{label}: cannot be read: {problem.strerror}") from None
    node = read_text(text, label)
    if node.value is None:
        raise RecipeError(f"{label}: the file is empty; expected 'key: value' lines")
    if not isinstance(node.value, dict):
        raise RecipeError(f"{node.origin}: expected a mapping of 'key: value' lines")
    return node


def read_text(text: str, label: str) -> YamlNode:
    """Parse one value. `label` is the name of its file, or the option `--set …`. Raises RecipeError."""
    try:
        loader = _Loader(text)
        loader.name = label
        root = loader.get_single_node()
        return _convert(loader, root) if root else YamlNode(None, label)
    except yaml.reader.ReaderError as problem:
        where = _origin(label, text.count("\n", 0, problem.position))
        raise RecipeError(f"{where}: control character (code {problem.character}); delete it") from None
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = _origin(label, mark.line) if mark else label
        raise RecipeError(f"{where}: {problem.problem or problem.context}{_advice(problem)}") from None
    except (ValueError, OverflowError):
        raise RecipeError(f"{label}: a '\\U' escape is not a valid character") from None


def _origin(label: str, line: int) -> str:
    return label if label.startswith("--set ") else f"{label}:{line + 1}"


def _advice(problem: yaml.MarkedYAMLError) -> str:
    """What to do about a syntax error of YAML."""
    text, context = str(problem.problem), str(problem.context)
    if r"'\t'" in text:
        return "; indent with spaces, not tabs"
    if "flow" in context and problem.context_mark:
        return f"; check the brackets that begin in line {problem.context_mark.line + 1}"
    if "mapping values are not allowed" in text or "block" in context:
        return "; check the indentation: all keys of a mapping begin in the same column"
    return ""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, and without anchors, aliases and tags.

    YAML 1.1 reads `1e-3` as a string, `no` as false, `010` as eight and `1:30` as ninety; 1.2 does not.
    """

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self._refuse(event, "anchors and aliases (& and *) are not allowed; write the value again")
        if getattr(event, "tag", None):
            self._refuse(event, f"the tag '{event.tag}' is not allowed; a recipe is plain data")
        if self.depth == DEEPEST:
            self._refuse(event, f"nested deeper than {DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, event: Any, problem: str) -> None:
        raise yaml.constructor.ConstructorError(problem=problem, problem_mark=event.start_mark)


for _tag, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?\.inf|\.nan", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)


def _convert(loader: _Loader, node: yaml.Node) -> YamlNode:
    """A composed node with its children; `loader` constructs the scalars."""
    where = _origin(loader.name, node.start_mark.line)
    if isinstance(node, yaml.SequenceNode):
        return YamlNode([_convert(loader, item) for item in node.value], where)
    if not isinstance(node, yaml.MappingNode):
        return YamlNode(loader.construct_object(node), where)
    children: dict[str, YamlNode] = {}
    for key, value in node.value:
        where_key = _origin(loader.name, key.start_mark.line)
        if key.tag != "tag:yaml.org,2002:str":
            raise RecipeError(f"{where_key}: a key must be text; put quotes around numbers and true or false")
        if key.value in children:
            raise RecipeError(f"{where_key}: {key.value}: written twice; first at {children[key.value].origin}")
        children[key.value] = YamlNode(_convert(loader, value).value, where_key)
    return YamlNode(children, where)
