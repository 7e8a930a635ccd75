"""Which parameters a segment trains, and at which learning rate."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from modules import HPCM
from modules.components import kind_names
from pipeline.common.errors import UserError


class SelectionError(UserError):
    """A pattern that selects nothing, or a parameter that no pattern selects; the message names it."""


def trainable_names(model: HPCM, train: str | Sequence[str], new: frozenset[str]) -> frozenset[str]:
    """Names of the parameters that `train` selects: `all`, or one or several selectors.

    A selector is `new` (the ledger's new tensors), the name of a kind of component, such as `rwkv` (parameters of all
    components of that kind), or a glob over names. Raises SelectionError for one that selects nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if train == "all":
        return frozenset(names)
    selected: set[str] = set()
    for selector in [train] if isinstance(train, str) else train:
        matched = _selected(selector, names, model, new)
        if not matched:
            raise SelectionError(f"train: {selector!r} matches no parameter of the model")
        selected |= matched
    return frozenset(selected)


def set_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Set `requires_grad` of every parameter: true for `names`, false for all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def parameter_groups(model: HPCM, rates: Mapping[str, float], new: frozenset[str]) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, each in exactly one: the first rate that selects it, in order.

    A key is a selector as in `trainable_names`, or `default`, which takes what the others leave. Raises SelectionError
    for a key that selects nothing and for a parameter that is left over.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = []
    for key in sorted(rates, key=lambda key: key == "default"):
        matched = set(rest) if key == "default" else _selected(key, list(rest), model, new)
        if not matched:
            raise SelectionError(f"lr: {key!r} selects no trainable parameter (an earlier key may have taken them)")
        names = [name for name in rest if name in matched]
        groups.append({"params": [rest.pop(name) for name in names], "names": names, "lr": rates[key], "key": key})
    if rest:
        raise SelectionError(f"lr: no rate for {next(iter(rest))} and {len(rest) - 1} more; add a `default`")
    return groups


def _selected(selector: str, names: list[str], model: HPCM, new: frozenset[str]) -> set[str]:
    if selector == "new":
        return {name for name in names if name in new}
    if selector in kind_names():
        prefixes = tuple(f"{path}." for path, kind in model.components().items() if kind.name == selector)
        return {name for name in names if name.startswith(prefixes)}
    return {name for name in names if fnmatchcase(name, selector)}
