"""Exported checkpoints have half the bytes and rounded weights, and load like any other."""

from pathlib import Path

import pytest
import torch
from mini import FOLDER, Hpcm, mini_codec

from modules import HPCM
from modules.bitstream.identity import model_identity
from pipeline.recipes.loading import load_recipe
from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import read_text
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, load_codec, publish, read_metadata, write
from pipeline.weights.export import export_half
from pipeline.weights.published import Lineage, Quality


def test_exported_weights_are_the_originals_rounded(tmp_path: Path) -> None:
    model = mini_codec(4)
    publish(tmp_path / "full.safetensors", model, Lineage(name="phase4", quality=Quality(1.0, 30.0, None, 2.0)))
    export_half(tmp_path / "full.safetensors", tmp_path / "half.safetensors")
    loaded = load_codec(tmp_path / "half.safetensors")
    assert loaded.config == model.config
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.half().float()), name
    for name, bound in model.entropy_estimation.named_buffers():
        assert torch.equal(loaded.entropy_estimation.get_buffer(name), bound), name
    assert read_metadata(tmp_path / "half.safetensors")["identity"] == model_identity(loaded).hex()
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.7 * sizes[1]


def test_the_stage_goes_along_without_its_folders(tmp_path: Path) -> None:
    stage = load_recipe(FOLDER, ["data.train=/home/me/photos", "data.val=/home/me/more"]).stages["phase1"]
    publish(tmp_path / "full.safetensors", mini_codec(1), Lineage(name="phase1", stage=stage.to_yaml()))
    export_half(tmp_path / "full.safetensors", tmp_path / "half.safetensors")
    kept = read_metadata(tmp_path / "half.safetensors")["stage"]
    assert Stage.model_validate(read_text(kept, "kept").plain()).digest() == stage.digest()
    assert "/home/me" not in kept


def test_a_codec_of_other_sizes_than_a_presets_is_exported_and_imported(tmp_path: Path, hpcm: Hpcm) -> None:
    publish(tmp_path / "full.safetensors", mini_codec(1), Lineage(name="phase1"))
    hpcm("export", tmp_path / "full.safetensors", tmp_path / "full.pth.tar")
    assert "settings of its own" in hpcm("import", tmp_path / "full.pth.tar", tmp_path / "again.safetensors").out
    digests = {read_metadata(tmp_path / f"{name}.safetensors")["digest"] for name in ("full", "again")}
    assert len(digests) == 1


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    model = mini_codec(0)
    write(tmp_path / "state.safetensors", codec_tensors(model), {})
    with pytest.raises(CheckpointError, match="training state"):
        export_half(tmp_path / "state.safetensors", tmp_path / "half.safetensors")
    with torch.no_grad():
        model.g_a.branch[0].weight[0, 0, 0, 0] = 1e6
    publish(tmp_path / "large.safetensors", model, Lineage(name="baseline"))
    with pytest.raises(CheckpointError, match=r"g_a.branch.0.weight holds values beyond"):
        export_half(tmp_path / "large.safetensors", tmp_path / "half.safetensors")
    assert not (tmp_path / "half.safetensors").exists()


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_file_that_exists_is_not_replaced_unasked(command: str, tmp_path: Path, hpcm: Hpcm) -> None:
    source, target = tmp_path / "source", tmp_path / "target.safetensors"
    if command == "export":
        publish(source, mini_codec(0), Lineage(name="baseline"))
    else:
        torch.save(HPCM.from_preset("tiny").state_dict(), source)
    target.write_bytes(b"mine")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    exists = "target.safetensors: exists; --overwrite replaces it"
    assert exists in hpcm(command, source, target, code=1).err
    assert target.read_bytes() == b"mine"
    same = "link.safetensors: is also the source file"
    assert same in hpcm(command, source, tmp_path / "link.safetensors", "--overwrite", code=1).err
    assert source.read_bytes() == before
    hpcm(command, source, target, "--overwrite")
    assert load_codec(target).config == (mini_codec(0) if command == "export" else HPCM.from_preset("tiny")).config
