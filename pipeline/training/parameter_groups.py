"""The trainable parameters of a segment, their learning rates and their weight decay."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from modules import HPCM
from modules.context.components import kind_names
from pipeline.recipes.yaml_source import Misfit, nearest


class SelectionError(Misfit):
    """A pattern selects nothing, or no pattern selects a parameter."""


def trainable_names(model: HPCM, train: str | Sequence[str], new: frozenset[str]) -> frozenset[str]:
    """Names of the parameters that `train` selects: `all`, or one or several selectors.

    A selector is `new` (the ledger's new tensors), a kind of component such as `rwkv` (the parameters of all components
    of that kind), or a glob over names. Raises SelectionError for a selector that selects nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if train == "all":
        return frozenset(names)
    selected: set[str] = set()
    for selector in [train] if isinstance(train, str) else train:
        matched = _selected(selector, names, model, new)
        if not matched:
            raise SelectionError(f"{selector!r} matches no parameter{_hint(selector, model, '')}", "train")
        selected |= matched
    return frozenset(selected)


def set_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Set `requires_grad` to true for `names` and to false for all other parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def parameter_groups(model: HPCM, rates: Mapping[str, float], new: frozenset[str]) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters. Each parameter gets the first rate whose key selects it.

    A key is a selector as in `trainable_names`, or `default` for all remaining parameters. Raises SelectionError for a
    key that selects nothing and for a parameter that no key selects.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = []
    for key in sorted(rates, key=lambda key: key == "default"):
        matched = set(rest) if key == "default" else _selected(key, list(rest), model, new)
        if not matched:
            earlier = " (an earlier key may already select them)"
            raise SelectionError(f"selects no trainable parameter{_hint(key, model, earlier)}", "lr", key)
        names = [name for name in rest if name in matched]
        groups.append({"params": [rest.pop(name) for name in names], "names": names, "lr": rates[key], "key": key})
    if rest:
        raise SelectionError(f"no rate for {next(iter(rest))} and {len(rest) - 1} more; add a `default`", "lr")
    return groups


def with_weight_decay(groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Divide each optimizer group into the weights of layers, which decay, and the other parameters, which do not."""
    divided = []
    for group in groups:
        for decays in (True, False):
            chosen = [
                (name, parameter)
                for name, parameter in zip(group["names"], group["params"], strict=True)
                if (name.endswith("weight") and parameter.dim() > 1) == decays
            ]
            if chosen:
                names, parameters = zip(*chosen, strict=True)
                rate = decay if decays else 0.0
                divided.append({**group, "params": [*parameters], "names": [*names], "weight_decay": rate})
    return divided


def _hint(selector: str, model: HPCM, otherwise: str) -> str:
    """The nearest valid selector; `otherwise` if this one is valid or none is near."""
    parts = dict.fromkeys(f"{name.partition('.')[0]}.*" for name, _ in model.named_parameters())
    valid = ["new", "default", *kind_names(), *parts]
    return (nearest(selector, valid) if selector not in valid else "") or otherwise


def _selected(selector: str, names: list[str], model: HPCM, new: frozenset[str]) -> set[str]:
    if selector == "new":
        return {name for name in names if name in new}
    if selector in kind_names():
        prefixes = tuple(f"{path}." for path, kind in model.components().items() if kind.name == selector)
        return {name for name in names if name.startswith(prefixes)}
    return {name for name in names if fnmatchcase(name, selector)}
