"""Codecs are saved to folders and loaded, as users of Hugging Face do it."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from mini import mini_codec

from modules import HPCM
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage, Quality, Validation


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
    lineage = Lineage("phase4", lmbda=0.013, metric="mse", quality=Quality(0.5, 30.5, None, 2.0))
    publish(tmp_path / "checkpoint.safetensors", saved[0], lineage)
    assert same(HPCM.from_pretrained(str(tmp_path)), saved[0])


def test_a_saved_codec_keeps_its_lineage_until_its_weights_change(saved: tuple[HPCM, Path], tmp_path: Path) -> None:
    published, kept, changed = tmp_path / "checkpoint.safetensors", tmp_path / "kept", tmp_path / "changed"
    quality, validation = Quality(0.5, 30.5, None, 2.0), Validation("d" * 64, ("one", "two"), 0.013, "mse")
    publish(published, saved[0], Lineage("phase4", None, 0.013, "mse", quality=quality, validation=validation))
    HPCM.from_pretrained(published).save_pretrained(kept)
    loaded = HPCM.from_pretrained(kept / "model.safetensors")
    assert (loaded.lmbda, loaded.lineage["name"], loaded.lineage["quality"]["bpp"]) == (0.013, "phase4", 0.5)
    card = (kept / "README.md").read_text()
    assert "Trained for λ = 0.013 (mse). Stage `phase4`." in card
    assert "Measured on 2 validation images: 0.5000 bpp, PSNR 30.50 dB." in card
    with torch.no_grad():
        loaded.means_hyper += 1
    loaded.save_pretrained(changed)
    assert set(json.loads((changed / "config.json").read_text())["lineage"]) == {"digest"}
    assert "Their training is not recorded." in (changed / "README.md").read_text()


def test_a_flipped_bit_is_recognized(saved: tuple[HPCM, Path], tmp_path: Path) -> None:
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: the weights do not match their digest"):
        HPCM.from_pretrained(tmp_path)


def test_a_name_on_the_hub_is_downloaded(saved: tuple[HPCM, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo_id: str, filename: str, **options: object) -> str:
        asked.append((repo_id, filename, options["revision"]))
        return str(saved[1] / filename)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda address, **options: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert same(HPCM.from_pretrained("somebody/codec", revision="v2"), saved[0])
    assert set(asked) == {("somebody/codec", name, "v2") for name in ("config.json", "model.safetensors")}


def test_a_hub_that_is_not_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def fail(address: str, **options: object) -> None:
        asked.append(address)
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(FileNotFoundError, match=r"somebody/codec: no such file or folder here; .* was not reached"):
        HPCM.from_pretrained("somebody/codec", cache_dir=tmp_path)
    assert len(asked) == 1


def test_errors_name_what_cannot_be_loaded(saved: tuple[HPCM, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a published stage's checkpoint\.safetensors nor model"):
        HPCM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and not a name on the Hugging Face Hub"):
        HPCM.from_pretrained("nowhere/")
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
