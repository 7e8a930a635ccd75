"""The optimizer of a segment: AdamW with the segment's parameter groups and learning rates."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from modules import HPCM
from pipeline.recipes.schema import Segment, Stage, StepDecay
from pipeline.training.parameter_groups import parameter_groups


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
