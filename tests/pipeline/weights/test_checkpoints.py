"""Files of weights: whole, verified, and never executed."""

import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mini import Malicious, mini_codec
from safetensors.torch import save

from modules import HPCM
from modules.bitstream.identity import model_identity
from pipeline.common.files import FileError
from pipeline.weights import checkpoints
from pipeline.weights.checkpoints import (
    CheckpointError,
    codec_tensors,
    import_official,
    load_codec,
    publish,
    read,
    write,
)
from pipeline.weights.published import Lineage, Quality, Validation
from pipeline.weights.training_state import Progress, StateFolder, TrainingState


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, HPCM]:
    model = mini_codec(4).eval()
    path = tmp_path / "checkpoint.safetensors"
    publish(path, model, Lineage(name="phase4"))
    return path, model


def test_the_same_weights_give_the_same_bytes(published: tuple[Path, HPCM], tmp_path: Path) -> None:
    path, model = published
    model.update()
    publish(tmp_path / "again.safetensors", model, Lineage(name="phase4"))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_checkpoint_has_the_permissions_that_the_umask_allows(published: tuple[Path, HPCM], tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert published[0].stat().st_mode == ordinary.stat().st_mode


def test_writing_leaves_the_old_file_until_the_new_one_is_whole(
    published: tuple[Path, HPCM], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = published
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match=r"checkpoint.safetensors: cannot be written: .*No space"):
        publish(path, mini_codec(4), Lineage())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_good_state(small_disk: Path) -> None:
    states = StateFolder(small_disk)
    tensors = {"weight": torch.zeros(200_000)}
    states.save(TrainingState(Progress(stage_step=1), tensors))
    states.save(TrainingState(Progress(stage_step=2), tensors))
    with pytest.raises(FileError, match=r"step-00000003.safetensors: cannot be written: .*\n  What was saved"):
        states.save(TrainingState(Progress(stage_step=3), tensors))
    assert [path.name for path in sorted(states.folder.iterdir())] == [
        "segment-00-step-00000001.safetensors", "segment-00-step-00000002.safetensors",
    ]  # fmt: skip
    state, passed_over = states.newest()
    assert (state.progress.stage_step, passed_over) == (2, [])


def test_a_state_of_another_form_is_passed_over(tmp_path: Path) -> None:
    states = StateFolder(tmp_path)
    states.save(TrainingState(Progress(stage_step=1), {"weight": torch.zeros(9)}))
    for step, progress in ((2, {"stage_step": "two"}), (3, None), (4, {"stage_step": 4, "of_tomorrow": 1})):
        path = states.folder / f"segment-00-step-{step:08d}.safetensors"
        write(path, {"weight": torch.zeros(9)}, {"progress": progress})
    state, passed_over = states.newest()
    assert (state.progress.stage_step, passed_over) == (4, [])  # Fields that are not known are ignored.
    path.unlink()
    state, passed_over = states.newest()
    assert (state.progress.stage_step, len(passed_over)) == (1, 2)


UNREADABLE = "not a readable safetensors file"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", UNREADABLE),
        (lambda content: content[:7], UNREADABLE),
        (lambda content: content[:5000], UNREADABLE),
        (lambda content: struct.pack("<Q", 2**62) + b"{}", UNREADABLE),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "do not match their digest"),
        (lambda content: save({"weight": torch.zeros(2)}), r"not a checkpoint of this pipeline; .*hpcm import"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    change: Callable[[bytes], bytes], message: str, published: tuple[Path, HPCM]
) -> None:
    path, _ = published
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"checkpoint.safetensors: .*{message}"):
        load_codec(path)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = mini_codec(0)
    tensors = codec_tensors(model)
    del tensors["h_a.branch.1.weight"]
    tensors["h_a.branch.1.weights"] = torch.zeros(3)
    tensors["means_hyper"] = torch.zeros(1, 9, 1, 1)
    tensors["scales_hyper"] = torch.full((1, 8, 1, 1), float("nan"))
    path = tmp_path / "odd.safetensors"
    checkpoints.write(path, tensors, {"config": model.config.to_dict()})
    with pytest.raises(CheckpointError) as caught:
        load_codec(path)
    message = str(caught.value)
    assert "4 tensors do not fit" in message
    assert "missing    h_a.branch.1.weight [8, 16, 2, 2]" in message
    assert "unexpected h_a.branch.1.weights [3]" in message
    assert "wrong size means_hyper [1, 9, 1, 1], expected [1, 8, 1, 1]" in message
    assert "not finite scales_hyper" in message


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(save: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth.tar", tmp_path / "ran"
    content = {"state_dict": {"g_a.branch.0.weight": torch.zeros(1)}, "extra": Malicious(mark)}
    if save == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"evil.pth.tar: holds more than tensors"):
        import_official(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ""),
        (b"PK\x03\x04 not a zip", ""),
        (b"\x80\x02.", ""),
        (b"no checkpoint", "not a PyTorch checkpoint"),
    ],
)
def test_a_file_that_is_no_official_checkpoint_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.pth.tar"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"broken.pth.tar: {message}"):
        import_official(path)
    torch.save(mini_codec(0).state_dict(), path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match=r"broken.pth.tar: truncated after 5000 bytes"):
        import_official(path)


def test_an_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    path, inflated = tmp_path / "plain.pth.tar", tmp_path / "inflated.pth.tar"
    torch.save({"state_dict": {"weight": torch.zeros(2**20)}}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(inflated, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert inflated.stat().st_size < 2**16
    with pytest.raises(CheckpointError, match=r"inflated.pth.tar: .* bytes that inflate to 4,19.*; refused"):
        import_official(inflated)


@pytest.mark.parametrize("name", ["huge.pth.tar", "huge.safetensors"])
def test_a_file_beyond_the_memory_is_not_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 2**43)  # Sparse: 8 TB that take no room.
    with pytest.raises(CheckpointError, match=rf"{name}: 8,796,093,022,208 bytes: loading it needs 8796.1 GB"):
        import_official(tmp_path / name) if name.endswith("tar") else read(tmp_path / name)


def test_settings_that_shape_no_tensor_are_checked(tmp_path: Path) -> None:
    model = mini_codec(0)
    for window, message in (
        (2**16 + 1, "pad images to multiples of"),
        (0, "expected a whole number"),
        ("8", "expected"),
    ):
        config = model.config.to_dict()
        config["attn_s3"] = {**config["attn_s3"], "window": window}
        write(tmp_path / "odd.safetensors", codec_tensors(model), {"config": config})
        with pytest.raises(CheckpointError, match=rf"odd.safetensors: its configuration is not valid \(.*{message}"):
            load_codec(tmp_path / "odd.safetensors")


def test_a_lineage_reads_back_as_it_was_written(tmp_path: Path) -> None:
    lineage = Lineage(
        name="phase1", inputs={"parent": "abc"}, quality=Quality(0.5, 30.0, None, 1.25),
        validation=Validation("digest", ("a.png", "b/λ.png"), 0.013, "mse"),
    )  # fmt: skip
    model = mini_codec(0)
    publish(tmp_path / "one.safetensors", model, lineage)
    found = Lineage.read(tmp_path / "one.safetensors")
    assert found.identity == model_identity(model).hex()
    assert replace(found, identity=None) == lineage


def test_a_lineage_with_a_field_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    model, path = mini_codec(0), tmp_path / "one.safetensors"
    write(path, codec_tensors(model), {"config": model.config.to_dict(), "quality": {"bpp": "much"}})
    with pytest.raises(CheckpointError, match=r"one.safetensors: damaged: quality.bpp: "):
        Lineage.read(path)
