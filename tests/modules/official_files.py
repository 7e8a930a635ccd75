"""Files in the form of the published checkpoints, built from the lists of their entries and the formula of weights."""

import json
from pathlib import Path
from typing import Any

import torch
from formula import weight
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
PRESETS = {"base": 280, "large": 346, "phi-context": 256}
"""Number of entries of a published file, by preset."""
FORMS: dict[str, dict[str, Any]] = {
    "zip": {"pickle_protocol": 2},
    "legacy": {"pickle_protocol": 2, "_use_new_zipfile_serialization": False},
}
"""Options of torch.save, by form of the file."""


def official_shapes(preset: str) -> dict[str, list[int]]:
    """Names and shapes of today's official state dict. PhiContext is Base without attention."""
    name = "large" if preset == "large" else "base"
    shapes = json.loads((GOLDENS / f"hpcm_{name}_state_dict.json").read_text())
    return {key: shape for key, shape in shapes.items() if preset != "phi-context" or not key.startswith("attn_")}


def published(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict as the files of 2025 have it: without the ten step vectors."""
    return {prefix + key: value for key, value in state.items() if not key.startswith("adaptive_params_list")}


def formula_state(preset: str) -> dict[str, Tensor]:
    """Today's state dict with the weights of the formula."""
    buffers = {"beta": 1.5, "scale_lower_bound.bound": 0.12, "likelihood_lower_bound.bound": 1e-9}
    values = {}
    for key, shape in official_shapes(preset).items():
        prefix, _, name = key.partition(".")
        if shape == [0]:
            values[key] = torch.empty(0, dtype=torch.float32 if key == "scale_table" else torch.int32)
        elif prefix == "entropy_estimation":
            values[key] = torch.full(shape, buffers[name])
        else:
            values[key] = torch.from_numpy(weight(key, tuple(shape)))
    return values


def zero_state(preset: str) -> dict[str, Tensor]:
    """Today's state dict with zeros that take no memory."""
    return {key: torch.zeros(1).expand(shape) for key, shape in official_shapes(preset).items()}
