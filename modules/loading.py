"""Checks weights from a file, which may come from anyone, and names those that do not fit a codec."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.bitstream.tables import BUFFERS
from modules.config import PRESETS, HPCMConfig, preset_config
from modules.network import HPCMNetwork
from modules.saved_codec import check_digest

STEP_VECTORS = "adaptive_params_list"
"""The ten vectors of the priors. The official files of 2025 lack them: the official code neither saved nor trained them
then, so they are ones."""
LARGEST_FACTOR = 1024
"""Largest padding multiple of a codec, in pixels. It needs a limit, because no tensor shape shows the window size."""


def codec_tensors(model: HPCMNetwork) -> dict[str, Tensor]:
    """The tensors that a file stores: all except the coding tables, which are built from the weights."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in BUFFERS}


def read_tensors(path: Path, digest: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError, which names it, if they do not have this `state_digest`."""
    try:
        check_digest(path, digest)
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in row-major order, in hexadecimal."""
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(values.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and values, in hexadecimal; independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor_digest(tensor)}\n".encode())
    return digest.hexdigest()


def bare_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict without the prefix that DataParallel adds to their names."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def lacks_step_vectors(tensors: Mapping[str, Any]) -> bool:
    """Whether a state dict has none of the ten step vectors."""
    return not any(name.startswith(f"{STEP_VECTORS}.") for name in tensors)


def nearest_config(tensors: Mapping[str, Tensor]) -> HPCMConfig:
    """The preset and phase that have most of these tensors, by name and shape."""

    def agreement(config: HPCMConfig) -> tuple[int, int]:
        expected = _shapes(config)
        return sum(expected.get(name) == tensor.shape for name, tensor in tensors.items()), -len(expected)

    return max((preset_config(name, phase) for name in PRESETS for phase in range(5)), key=agreement)


@cache
def _shapes(config: HPCMConfig) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in HPCMNetwork.on_meta(config).state_dict().items()}


def checked_config(values: Any, tensors: Mapping[str, Tensor]) -> HPCMConfig:
    """The configuration that `HPCMConfig.to_dict` wrote, if these tensors fit it; raises ValueError otherwise.

    So a file cannot describe a codec that is larger than its own tensors. Nothing of the codec's size is allocated.
    """
    try:
        config = HPCMConfig.from_dict(values)
        blocks = [*config.depths, *(kind.num_blocks for kind in config.components.values())]
        if max(blocks) > len(tensors):
            raise ValueError("more blocks than the file has tensors")
        sketch = HPCMNetwork.on_meta(config)
        if sketch.downsampling_factor > LARGEST_FACTOR:
            raise ValueError(f"its attention windows pad images to multiples of {sketch.downsampling_factor} pixels")
    except Exception as error:  # Invalid values can raise almost any class.
        raise ValueError(f"its configuration is not valid ({error})") from error
    check_fit(sketch, tensors)
    return config


def check_fit(model: HPCMNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, which lists missing, unexpected and unusable tensors.

    All step vectors may be missing, as `HPCM.load_state_dict` sets them to ones.
    """
    expected = codec_tensors(model)
    if lacks_step_vectors(tensors):
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(STEP_VECTORS)}
    problems = [f"missing    {name} {list(t.shape)}" for name, t in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name].shape:
            problems.append(f"wrong size {name} {list(tensor.shape)}, expected {list(expected[name].shape)}")
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            problems.append(f"not plain  {name}: sparse, quantized or without data")
        elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            problems.append(f"not finite {name}: NaN, infinite or integer values")
    if problems:
        more = [f"… and {len(problems) - 12} more"] if len(problems) > 12 else []
        raise ValueError("\n  ".join([f"{len(problems)} tensors do not fit the codec:", *problems[:12], *more]))
