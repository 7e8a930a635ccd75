"""Loads weights from a file into a codec, and names those that do not fit. A file may come from anyone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.config import HPCMConfig
from modules.config_history import is_first_form

if TYPE_CHECKING:
    from modules.codec import HPCM

LARGEST_FACTOR = 1024
"""Largest padding multiple of a codec, in pixels. It needs a limit, because no tensor shape shows the window size."""


def codec_tensors(model: "HPCM") -> dict[str, Tensor]:
    """The tensors that a file stores: all except the coding tables, which are built from the weights."""
    return {name: t for name, t in model.state_dict().items() if name not in model.coding_table_names()}


def build(codec: "type[HPCM]", values: Any, tensors: Mapping[str, Tensor]) -> "HPCM":
    """The codec of a configuration, as `HPCMConfig.from_dict` reads it, with these weights.

    It is in evaluation mode, and its coding tables are built. Raises ValueError for a configuration that is not valid
    and for tensors that do not fit it. Nothing of the codec's size is allocated before that.
    """
    config = _checked_config(codec, values, tensors)
    model = codec(config)
    model.load_state_dict(tensors)
    if is_first_form(values):
        model.saved_config = values
    model.update()
    return model.eval()


def check_fit(model: "HPCM", tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, which lists missing, unexpected and unusable tensors."""
    expected = codec_tensors(model)
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


def _checked_config(codec: "type[HPCM]", values: Any, tensors: Mapping[str, Tensor]) -> HPCMConfig:
    """The checked configuration. The check prevents a file from describing a codec larger than its own tensors."""
    try:
        config = HPCMConfig.from_dict(values)
        blocks = [*config.depths, *(kind.num_blocks for kind in config.components.values())]
        if max(blocks) > len(tensors):
            raise ValueError("more blocks than the file has tensors")
        sketch = codec.on_meta(config)
        if sketch.downsampling_factor > LARGEST_FACTOR:
            raise ValueError(f"its attention windows pad images to multiples of {sketch.downsampling_factor} pixels")
    except Exception as error:  # Invalid values can raise almost any class.
        raise ValueError(f"its configuration is not valid ({error})") from error
    check_fit(sketch, tensors)
    return config
