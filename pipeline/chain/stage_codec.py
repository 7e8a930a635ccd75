"""The codec that a stage's settings describe."""

from pathlib import Path

import torch

from modules import HPCM
from modules.biwkv4.kernels import cpu_kernels, cuda_kernels
from modules.config import HPCMConfig, preset_of
from pipeline.chain.stage_task import StageTask
from pipeline.common.errors import UserError
from pipeline.training.codec_choice import config_of
from pipeline.weights.checkpoints import load_codec


class StageError(UserError):
    """A stage cannot begin, or its result is not accepted."""


def codec_config(task: StageTask) -> HPCMConfig:
    """The configuration of a stage's codec. Raises RecipeError for invalid settings."""
    return config_of(task.stage, task.source)


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
        preset = preset_of(model.config)
        hint = f", such as with --set model.preset={preset[0]}" if preset else ""
        raise StageError(
            f"{path}: does not match the recipe's {task.stage.name}: {'; '.join(differing)}.\n"
            f"  Give a checkpoint with these settings, or choose a recipe that matches the file{hint}."
        )
    return model
