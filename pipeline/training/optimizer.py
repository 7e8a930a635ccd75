"""The optimizer of a segment: AdamW with the segment's parameter groups and learning rates."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from modules import HPCM
from modules.context.components import kind_names
from pipeline.recipes.schema import Segment, Stage, StepDecay
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


def parameter_groups(
    model: HPCM, rates: Mapping[str, float], new: frozenset[str], weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters. Each parameter gets the first rate whose key selects it.

    A key is a selector as in `trainable_names`, or `default` for all remaining parameters. With `weight_decay`, a key
    has one group for the weights of layers, which decay, and one for the other parameters. Raises SelectionError for a
    key that selects nothing and for a parameter that no key selects.
    """
    rest = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = []
    for key in sorted(rates, key=lambda key: key == "default"):
        matched = set(rest) if key == "default" else _selected(key, list(rest), model, new)
        if not matched:
            earlier = " (an earlier key may already select them)"
            raise SelectionError(f"selects no trainable parameter{_hint(key, model, earlier)}", "lr", key)
        decaying = {name for name in matched if weight_decay and name.endswith("weight") and rest[name].dim() > 1}
        for chosen, decay in ((decaying, weight_decay), (matched - decaying, 0.0)):
            if names := [name for name in rest if name in chosen]:
                group = {"params": [rest.pop(name) for name in names], "names": names, "lr": rates[key], "key": key}
                groups.append({**group, "weight_decay": decay})
    if rest:
        raise SelectionError(f"no rate for {next(iter(rest))} and {len(rest) - 1} more; add a `default`", "lr")
    return groups


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


def build_optimizer(model: HPCM, stage: Stage, segment: Segment, new: frozenset[str]) -> AdamW:
    """The optimizer of the model's trainable parameters. `new` names the tensors that a frozen segment trains.

    Each group has the `names` of its parameters, the `key` of its rate in the recipe, and its `full_lr`.
    """
    groups = parameter_groups(model, segment.lr, new, stage.optimizer.weight_decay)
    return AdamW([{**group, "full_lr": group["lr"]} for group in groups], betas=stage.optimizer.betas, fused=True)


def set_learning_rates(optimizer: Optimizer, segment: Segment, step: int) -> None:
    """Set the learning rate of every group for a step of the segment."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * schedule_factor(segment, step)


def schedule_factor(segment: Segment, step: int) -> float:
    """Factor of the learning rates at a step: linear warm-up times the segment's decay."""
    rise = min(1.0, (step + 1) / segment.warmup) if segment.warmup else 1.0
    if isinstance(segment.decay, StepDecay):
        drops = sum(step >= at for at in segment.decay.at)
        return rise * float(segment.decay.factor**drops)
    return rise * (0.5 * (1 + math.cos(math.pi * step / segment.steps)) if segment.decay == "cosine" else 1.0)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by parameter name. Its groups must have `names` as well as `params`."""
    return {
        f"{key}/{name}": value.clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore tensors of `optimizer_tensors` on the parameters' devices; fused Adam needs its `step` there too."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.removesuffix(f"/{name}"): t for key, t in tensors.items() if key.partition("/")[2] == name}
            if state:
                optimizer.state[parameter] = {
                    key: torch.empty_like(t if t.dim() == 0 else parameter, device=parameter.device).copy_(t)
                    for key, t in state.items()
                }
