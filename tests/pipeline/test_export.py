"""Checkpoints to ship: half the bytes, weights rounded, loadable like any other."""

from pathlib import Path

import pytest
import torch
from mini import mini_codec

from pipeline.checkpoints import CheckpointError, codec_tensors, load_codec, publish, write
from pipeline.export import export_half


def test_exported_weights_are_the_originals_rounded(tmp_path: Path) -> None:
    model = mini_codec(4)
    publish(tmp_path / "full.safetensors", model, {"name": "phase4", "quality": {"bpp": 1.0}})
    export_half(tmp_path / "full.safetensors", tmp_path / "half.safetensors")
    loaded = load_codec(tmp_path / "half.safetensors")
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name
    for name, bound in model.entropy_estimation.named_buffers():
        assert torch.equal(loaded.entropy_estimation.get_buffer(name), bound), name
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    model = mini_codec(0)
    write(tmp_path / "state.safetensors", codec_tensors(model), {})
    with pytest.raises(CheckpointError, match="training state"):
        export_half(tmp_path / "state.safetensors", tmp_path / "half.safetensors")
    with torch.no_grad():
        model.g_a.branch[0].weight[0, 0, 0, 0] = 1e6
    publish(tmp_path / "large.safetensors", model, {"name": "baseline"})
    with pytest.raises(CheckpointError, match=r"g_a.branch.0.weight holds values beyond"):
        export_half(tmp_path / "large.safetensors", tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists()
