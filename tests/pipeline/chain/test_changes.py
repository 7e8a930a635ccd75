"""Changed settings are named by key."""

from pathlib import Path

import pytest
from mini import FOLDER, mini_codec

from pipeline.chain.changes import recipe_changes
from pipeline.recipes.loading import load_recipe
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "checkpoint.safetensors"
    stage = load_recipe(FOLDER, ["schedule.unfrozen.lr={default: 1.0e-3, rwkv: 2.0e-3}"]).stages["phase1"]
    publish(path, mini_codec(1), Lineage(name="phase1", stage=stage.to_yaml()))
    return path


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], ""),
        (["data.batch_size=4"], "data.batch_size: 2 → 4"),
        (["model.overrides.N=16"], "model.overrides.N: 8 → 16"),
        (["model.overrides.attn_s1={blocks: 2}"], 'model.overrides.attn_s1: none → {"blocks": 2}'),
        (
            ["keep=best", "validate_every=2"],
            'validate_every: none → 2, keep: none → best, evaluation: none → {"images": 1}',
        ),
        (["schedule.unfrozen.decay=cosine", "log_every=3"], "schedule.unfrozen.decay: constant → cosine"),
        (
            ["schedule.unfrozen.lr={rwkv: 2.0e-3, default: 1.0e-3}"],
            'schedule.unfrozen.lr: {"default": 0.001, "rwkv": 0.002} → {"rwkv": 0.002, "default": 0.001}',
        ),
        (["seed=1", "ema=0.9", "compile=true", "precision=bf16", "data.crop=256"], ", and 1 more"),
    ],
)
def test_changes_are_told_by_key(published: Path, settings: list[str], told: str) -> None:
    same = ["schedule.unfrozen.lr={default: 1.0e-3, rwkv: 2.0e-3}"]
    changes = recipe_changes(published, load_recipe(FOLDER, [*same, *settings]).stages["phase1"])
    assert changes == told if len(settings) < 5 else changes.endswith(told)


def test_what_cannot_be_told_is_left_out(tmp_path: Path) -> None:
    stage = load_recipe(FOLDER).stages["phase1"]
    assert recipe_changes(tmp_path / "nowhere", stage) == ""
    publish(tmp_path / "other.safetensors", mini_codec(1), Lineage(name="phase1", stage="name: phase1"))
    assert recipe_changes(tmp_path / "other.safetensors", stage) == ""
