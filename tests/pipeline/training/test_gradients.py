"""A batch that is computed in parts trains the same weights as the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mini import logged, mini_stage, trainer_of

from pipeline.data.crops import TrainingCrops
from pipeline.recipes.schema import Stage


class DoubleCrops(TrainingCrops):
    def __getitem__(self, n: int) -> dict[str, Any]:
        crop = super().__getitem__(n)
        return {**crop, "image": crop["image"].double()}


def baseline(accumulate: int) -> Stage:
    stage = mini_stage("baseline")
    data = stage.data.model_copy(update={"batch_size": 3, "accumulate": accumulate})
    schedule = (stage.schedule[0].model_copy(update={"steps": 3}),)
    return stage.model_copy(update={"data": data, "schedule": schedule, "log_every": 1})


def trained(accumulate: int, states: Path) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, float]]]:
    """Weights and logged values of three steps in float64."""
    torch.manual_seed(0)
    trainer, start = trainer_of(baseline(accumulate), states)
    crops = trainer.crops
    trainer.crops = DoubleCrops(crops.photos, crops.crop, crops.seed)
    trainer.migration.child.double()
    return trainer.train(start).model, logged(trainer)


def test_training_in_parts_is_training_with_the_whole_batch(tmp_path: Path) -> None:
    (whole, expected), (parts, found) = (trained(n, tmp_path / str(n)) for n in (1, 3))
    assert next(iter(whole.values())).dtype == torch.float64
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-9, msg=name)
    for step, values in expected.items():
        values.pop("train/scratch/step_seconds")
        assert {key: found[step][key] for key in values} == pytest.approx(values, rel=1e-9)
