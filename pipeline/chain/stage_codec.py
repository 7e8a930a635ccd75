"""The codec that a stage's settings describe."""

import re
from contextlib import suppress
from pathlib import Path

import torch

from modules import HPCM
from modules.biwkv4.build import cpu_kernels, cuda_kernels
from modules.config import PRESETS, HPCMConfig, preset_config, preset_of
from pipeline.chain.stage_task import StageTask
from pipeline.common.errors import UserError
from pipeline.recipes.loading import RecipeError
from pipeline.recipes.schema import ModelChoice
from pipeline.recipes.yaml_source import Misfit
from pipeline.weights.checkpoints import load_codec


class StageError(UserError):
    """A stage cannot begin, or its result is not accepted."""


def codec_config(task: StageTask) -> HPCMConfig:
    """The configuration of a stage's codec. Raises RecipeError for invalid settings."""
    choice, lmbda = task.stage.model, task.stage.lmbda
    try:
        config = preset_config(choice.preset, choice.phase, **choice.overrides)
    except ValueError as error:
        raise RecipeError(task.located(_misfit(choice, str(error)))) from error
    if config.rates and not config.rates[0] <= lmbda <= config.rates[-1]:
        problem = f"the chain's λ = {lmbda} must lie between the first and the last of {list(config.rates)}"
        raise RecipeError(task.located(Misfit(problem, "model", "overrides", "rates")))
    return config


def _misfit(model: ModelChoice, problem: str) -> Misfit:
    """The problem of a codec's configuration, with the key that it names."""
    if model.preset not in PRESETS:
        return Misfit(problem, "model", "preset")
    named = [key for key in model.overrides if re.search(rf"\b{re.escape(key)}\b", problem)]
    path = ("overrides", named[0]) if named else ()
    return Misfit(problem.removeprefix(f"{named[0]}: ") if named else problem, "model", *path)


def kernel(task: StageTask, device: torch.device) -> str:
    """The implementation of the Bi-WKV4 operator on a device; empty for a codec without it."""
    if not any(kind.name == "rwkv" for kind in codec_config(task).components.values()):
        return ""
    kernels = cuda_kernels() if device.type == "cuda" else cpu_kernels()
    return "compiled" if kernels else "PyTorch reference"


def load_fitting(task: StageTask, path: Path) -> HPCM:
    """Load a codec with the configuration of a stage from a checkpoint, official or not. Raises StageError."""
    model, expected = load_codec(path), codec_config(task)
    if model.config != expected:
        found, wanted = model.config.to_dict(), expected.to_dict()
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        differing = [f"{name} is {found.get(name, 'none')}, expected {wanted.get(name, 'none')}" for name in names]
        hint = ""
        with suppress(StopIteration):  # The codec is no preset.
            hint = f", such as with --set model.preset={preset_of(model.config)[0]}"
        raise StageError(
            f"{path}: does not match the recipe's {task.stage.name}: {'; '.join(differing)}.\n"
            f"  Give a checkpoint with these settings, or choose a recipe that matches the file{hint}."
        )
    return model
