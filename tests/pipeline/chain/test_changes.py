"""Changed settings are named by key."""

import pytest
from mini import FOLDER

from pipeline.chain.changes import recipe_changes
from pipeline.recipes.loading import load_recipe

RATES = "schedule.unfrozen.lr={default: 1.0e-3, rwkv: 2.0e-3}"


@pytest.mark.parametrize(
    ("settings", "expected"),
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
def test_changes_are_named_by_key(settings: list[str], expected: str) -> None:
    published = load_recipe(FOLDER, [RATES]).stages["phase1"].to_yaml()
    changes = recipe_changes(published, load_recipe(FOLDER, [RATES, *settings]).stages["phase1"])
    assert changes == expected if len(settings) < 5 else changes.endswith(expected)


@pytest.mark.parametrize("published", ["", "name: phase1", "["])
def test_settings_that_cannot_be_read_are_left_out(published: str) -> None:
    assert recipe_changes(published, load_recipe(FOLDER).stages["phase1"]) == ""
