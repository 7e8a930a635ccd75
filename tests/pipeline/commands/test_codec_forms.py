"""Every command takes a codec in every form: files, folders, and names."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mini import mini_codec

from modules import HPCM, HPCMConfig
from pipeline.commands import checkpoint_info
from pipeline.commands.checkpoint_info import CheckpointInfo, codec_path, is_codec
from pipeline.commands.lazy import with_options
from pipeline.weights import checkpoints, shipped
from pipeline.weights.checkpoints import CheckpointError, load_codec, publish
from pipeline.weights.export import export_compressai
from pipeline.weights.published import Lineage

TAKES_CODECS = {
    "compare": "checkpoints", "compress": "checkpoint", "decompress": "checkpoint", "evaluate": "checkpoint",
    "export": "source", "plan": "baseline", "run": "baseline",
}  # fmt: skip
FORMS = {
    "stage's folder": "stage",
    "checkpoint": "stage/checkpoint.safetensors",
    "folder of save_pretrained": "saved",
    "its file": "saved/model.safetensors",
    "exported file": "exported.pth.tar",
    "official file": "HPCM_0.013.pth.tar",
    "registered": "models:/hpcm-mini@phase4",
    "on the Hub": "somebody/codec",
    "bundled": "control-small",
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[HPCM, Path]:
    """A codec, and a folder with all of its forms. Tests must not change them."""
    folder = tmp_path_factory.mktemp("forms")
    publish(folder / FORMS["checkpoint"], mini_codec(4), Lineage("control", lmbda=0.013, metric="mse"))
    model = load_codec(folder / FORMS["checkpoint"])
    model.save_pretrained(folder / "saved")
    shutil.copytree(folder / "saved", folder / "hub" / "models--somebody--codec" / "snapshots" / "1")
    (folder / "hub" / "models--somebody--codec" / "refs").mkdir()
    (folder / "hub" / "models--somebody--codec" / "refs" / "main").write_text("1")
    export_compressai(folder / FORMS["checkpoint"], folder / FORMS["exported file"])
    torch.save({"state_dict": model.state_dict()}, folder / FORMS["official file"])
    (folder / "weights").mkdir()
    shutil.copy(folder / FORMS["checkpoint"], folder / "weights" / "control-small.safetensors")
    return model, folder


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_codec_is_found_loaded_and_described_in_every_form(
    form: str, forms: tuple[HPCM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = forms
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(shipped, "WEIGHTS", folder / "weights")
    monkeypatch.setattr(checkpoints, "nearest_config", lambda tensors: model.config)
    monkeypatch.setattr(checkpoint_info, "registered_file", lambda address: folder / FORMS["checkpoint"])
    assert is_codec(Path(form))
    path = codec_path(form)
    loaded, described = load_codec(path), CheckpointInfo.read(path).to_json()
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.lmbda, described["lmbda"], described["metric"]) == (0.013, 0.013, "mse")
    assert HPCMConfig.from_dict(described["config"]) == loaded.config == model.config
    assert described["digest"] == model.lineage["digest"]


@pytest.mark.parametrize(("command", "parameter"), TAKES_CODECS.items())
def test_commands_use_one_loader(command: str, parameter: str) -> None:
    function = getattr(import_module(f"pipeline.commands.{command}"), command)
    assert with_options(function).__annotations__[parameter].__metadata__[0].parser is codec_path


def test_a_codec_that_does_not_exist_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no-codec: no such file or folder; the bundled codecs are baseline, c"):
        codec_path("no-codec")
    with pytest.raises(CheckpointError, match="load it with load_registered"):
        load_codec("models:/hpcm-mini@phase4")
    with pytest.raises(CheckpointError, match="neither a published stage's checkpoint"):
        codec_path(str(tmp_path))
