"""Which parameters a segment trains, and at which learning rate."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from modules import HPCM
from modules.rwkv import RWKVComponent
from pipeline.common.errors import UserError


class SelectionError(UserError):
    """A pattern that selects nothing, or a parameter that no pattern selects; the message names it."""


def trainable_names(model: HPCM, train: str | Sequence[str], new: frozenset[str]) -> frozenset[str]:
    """Names of the parameters that `train` selects: `all`, `new` (the ledger's new tensors), or a list.

    An entry of a list is `new`, `rwkv` (parameters of RWKV components) or a glob over names. Raises SelectionError for
    one that selects nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    if train == "all":
        return frozenset(names)
    patterns = [train] if isinstance(train, str) else list(train)
    selected: set[str] = set()
    for pattern in patterns:
        matched = _matching(pattern, names, new, rwkv_parameters(model))
        if not matched:
            raise SelectionError(f"train: {pattern!r} matches no parameter of the model")
        selected |= matched
    return frozenset(selected)


def set_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Set `requires_grad` of every parameter: true for `names`, false for all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def parameter_groups(model: HPCM, rates: Mapping[str, float], new: frozenset[str]) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, each in exactly one: the first rate that selects it, in order.

    A key is `new`, `rwkv` (parameters of RWKV components), a glob over names, or `default`, which takes what the
    others leave. Raises SelectionError for a key that selects nothing and for a parameter that is left over.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rwkv = rwkv_parameters(model)
    groups = []
    for key in sorted(rates, key=lambda key: key == "default"):
        matched = set(rest) if key == "default" else _matching(key, list(rest), new, rwkv)
        if not matched:
            raise SelectionError(f"lr: {key!r} selects no trainable parameter (an earlier key may have taken them)")
        names = [name for name in rest if name in matched]
        groups.append({"params": [rest.pop(name) for name in names], "names": names, "lr": rates[key], "key": key})
    if rest:
        raise SelectionError(f"lr: no rate for {next(iter(rest))} and {len(rest) - 1} more; add a `default`")
    return groups


def rwkv_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that belong to RWKV components."""
    return frozenset(
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, RWKVComponent)
        for name, _ in module.named_parameters()
    )


def _matching(pattern: str, names: list[str], new: frozenset[str], rwkv: frozenset[str]) -> set[str]:
    if pattern == "new":
        return {name for name in names if name in new}
    if pattern == "rwkv":
        return {name for name in names if name in rwkv}
    return {name for name in names if fnmatchcase(name, pattern)}
