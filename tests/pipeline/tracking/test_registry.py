"""Published stages in MLflow's registry: their names, aliases, and loading."""

import shutil
from dataclasses import replace
from pathlib import Path

import mlflow.pytorch
import pytest
import torch
from pages import measured

from pipeline.commands.checkpoint_info import codec_path
from pipeline.records.record import StageRecord
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.registry import registered_name
from pipeline.tracking.store import Store
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.metadata import CheckpointError

NAME = "hpcm-mini-lmbda-0.013"


def test_recipe_rate_and_seed_name_a_registered_model(chain: Path) -> None:
    record = StageRecord.read(chain / "phase1")
    assert registered_name(record) == NAME
    assert registered_name(replace(record, recipe="wide", seed=3)) == "hpcm-wide-lmbda-0.013-seed-3"


def test_a_registered_codec_is_loaded_by_its_alias(
    chain: Path, copied: tuple[Path, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    copied[0].parents[1].rename(moved)
    monkeypatch.chdir(moved.parent)  # where `runs` is the default
    image = torch.rand(1, 3, 40, 60)
    expected = load_codec(chain / "phase1" / "checkpoint.safetensors").compress(image)
    assert load_codec(codec_path(f"models:/{NAME}@phase1")).compress(image) == expected
    with pytest.raises(CheckpointError, match="MLflow has no such codec"):
        codec_path(f"models:/{NAME}@phase5")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"runs/mlflow\.db: no such file"):
        codec_path(f"models:/{NAME}@phase1")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Store.default(moved).uri)
    assert mlflow.pytorch.load_model(f"models:/{NAME}@phase1").compress(image) == expected


def test_the_best_version_is_one_that_was_measured_as_the_newest(copied: tuple[Path, Store]) -> None:
    folder, store = copied
    for number, (metric, loss) in enumerate([("ms-ssim", 0.2), ("mse", 1.0), ("ms-ssim", 0.1), ("ms-ssim", 0.3)]):
        name = f"v{number}" if number else "latest"  # MLflow reserves such aliases.
        shutil.copytree(folder / "phase1", folder / name)
        record = measured(StageRecord.read(folder / name), rd_loss=loss)
        lineage = replace(record.lineage, validation=replace(record.lineage.validation, metric=metric))
        attempts = (replace(record.attempts[0], began=record.began + 1 + number),)
        replace(record, key=name, name=name, lineage=lineage, attempts=attempts).write(folder / name)
    Mirror(store).chain(folder, working=False)
    aliases = store.client().get_registered_model(NAME).aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"baseline": 1, "phase1": 2, "best": 5}
