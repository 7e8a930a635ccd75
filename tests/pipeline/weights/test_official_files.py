"""The published checkpoints, which lack the ten step vectors, are read as the official code trained them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mini import Hpcm
from official_files import FORMS, PRESETS, formula_state, published, zero_state
from PIL import Image
from torch import Tensor

from modules import HPCM, preset_config
from modules.compressai_tools import main as compressai
from pipeline.weights.checkpoints import CheckpointError, load_codec
from pipeline.weights.metadata import read_metadata

SAID = "adaptive_params_list is absent, as in official files of 2025: its ten vectors are ones"


@pytest.mark.parametrize(
    ("preset", "form", "prefix"),
    [("base", "zip", ""), ("large", "legacy", "module."), ("phi-context", "zip", "module.")],
)
def test_every_published_form_is_recognized(
    preset: str, form: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, state = tmp_path / "0.013.pth.tar", published(zero_state(preset), prefix)
    assert len(state) == PRESETS[preset]
    torch.save(state, path, **FORMS[form])
    codec = load_codec(path)
    assert codec.config == preset_config(preset)
    assert all(torch.equal(vector, torch.ones(1, 960, 1, 1)) for vector in codec.adaptive_params_list)
    assert codec.filled_with_ones == "adaptive_params_list"
    assert [record.message for record in caplog.records] == [SAID]


@pytest.mark.parametrize(
    "preset",
    ["phi-context", *(pytest.param(name, marks=pytest.mark.slow) for name in ("base", "large"))],
)
@torch.no_grad()
def test_a_published_file_computes_as_todays_with_ones(preset: str, tmp_path: Path, picture: Tensor) -> None:
    path, state, image = tmp_path / "official.pth.tar", formula_state(preset), picture[:, :, :64, :64]
    torch.save(published(state), path, **FORMS["legacy"])
    expected = HPCM.from_preset(preset).eval()
    expected.load_state_dict(state)
    trained = expected(image)["y_hat"]
    for vector in expected.adaptive_params_list:
        vector.fill_(1)
    computed = expected(image)
    imported = load_codec(path)(image)
    assert not torch.equal(trained, computed["y_hat"])
    for name in ("x_hat", "y_hat", "scales"):
        assert torch.equal(imported[name], computed[name]), name


def test_a_file_that_lacks_nine_of_ten_vectors_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "official.pth.tar", zero_state("phi-context")
    torch.save({**published(state), "adaptive_params_list.3": state["adaptive_params_list.3"]}, path)
    with pytest.raises(CheckpointError) as caught:
        load_codec(path)
    assert f"{path}: 9 tensors do not fit the codec" in str(caught.value)
    assert "missing    adaptive_params_list.0 [1, 960, 1, 1]" in str(caught.value)


def test_a_state_dict_with_nine_missing_is_refused() -> None:
    state = published(HPCM.from_preset("tiny").state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "adaptive_params_list.0", '):
        HPCM.from_state_dict({**state, "adaptive_params_list.3": torch.ones(1, 144, 1, 1)})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file in the published form, of the codec `tiny`."""
    path = tmp_path / "0.013.pth.tar"
    torch.save(published(HPCM.from_preset("tiny").state_dict(), "module."), path, **FORMS["legacy"])
    return path


def test_the_lineage_of_an_imported_file_tells_of_the_ones(small: Path, tmp_path: Path, hpcm: Hpcm) -> None:
    target = tmp_path / "baseline.safetensors"
    hpcm("import", small, target)
    assert read_metadata(target)["filled_with_ones"] == "adaptive_params_list"
    assert "imported from 0.013.pth.tar, adaptive_params_list set to ones" in hpcm("info", target).out
    assert load_codec(target).filled_with_ones is None


def test_compressai_evaluates_a_published_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # which CompressAI changes
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (176, 176), "gray").save(folder / "image.png")
    threads = torch.get_num_threads()
    compressai(["eval_model", "checkpoint", str(folder), "-a", "hpcm", "-p", str(small), "--entropy-estimation"])
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out)["results"]["bpp"][0] > 0
