"""Codecs are saved to folders and loaded, as users of Hugging Face do it."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from mini import mini_codec

from modules import HPCM
from modules import pretrained as pretrained_module
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[HPCM, Path]:
    """A codec of narrow RWKV components, and the folder to which it was saved. Tests must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "codec"
    model = mini_codec(4).eval()
    model.save_pretrained(folder)
    model.update()
    return model, folder


def same(one: HPCM, other: HPCM) -> bool:
    state = other.state_dict()
    return one.config == other.config and all(torch.equal(t, state[name]) for name, t in one.state_dict().items())


def test_a_saved_codec_is_loaded_ready_to_code(saved: tuple[HPCM, Path]) -> None:
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = HPCM.from_pretrained(folder)
    assert same(loaded, model)
    assert not loaded.training
    image = torch.rand(1, 3, 50, 70)
    assert loaded.compress(image) == model.compress(image)


def test_the_model_card_describes_the_codec(saved: tuple[HPCM, Path]) -> None:
    model, folder = saved
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: hpcm-rwkv\nlicense: mit\n")
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters" in card
    assert "| `attn_s1` | rwkv | hidden_rate 1, mix_rate 1 |" in card


def test_the_folder_of_a_published_stage_loads(saved: tuple[HPCM, Path], tmp_path: Path) -> None:
    publish(tmp_path / "checkpoint.safetensors", saved[0], Lineage(name="phase4"))
    assert same(HPCM.from_pretrained(str(tmp_path)), saved[0])


def test_a_name_on_the_hub_is_downloaded(saved: tuple[HPCM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, **options: object) -> str:
        asked.append((repo_id, filename, options["revision"]))
        return str(saved[1] / filename)

    monkeypatch.setattr(pretrained_module, "hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    assert same(HPCM.from_pretrained("somebody/codec", revision="v2"), saved[0])
    assert set(asked) == {("somebody/codec", name, "v2") for name in ("config.json", "model.safetensors")}


def test_errors_name_what_cannot_be_loaded(saved: tuple[HPCM, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither config\.json and model\.safetensors nor"):
        HPCM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and not a name on the Hugging Face Hub"):
        HPCM.from_pretrained("nowhere/")
    with pytest.raises(NotADirectoryError, match="give the folder that contains it"):
        HPCM.from_pretrained(saved[1] / "model.safetensors")
    config = json.loads((saved[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "M": 24}))
    (tmp_path / "model.safetensors").write_bytes((saved[1] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors: \d+ tensors do not fit the codec"):
        HPCM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": [10**6, 1, 1]}))
    with pytest.raises(ValueError, match="more blocks than the file has tensors"):
        HPCM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HPCM.from_pretrained(tmp_path)


def test_a_codec_can_still_be_copied_and_pickled(saved: tuple[HPCM, Path]) -> None:
    assert same(copy.deepcopy(saved[0]), saved[0])
    assert same(pickle.loads(pickle.dumps(saved[0])), saved[0])
