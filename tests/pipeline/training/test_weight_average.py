"""The moving average of the weights: what it holds, and that a resumed segment continues it."""

import signal
from pathlib import Path

import pytest
import torch
from mini import Stop, mini_chain, run_chain

from pipeline.common.errors import Interrupted
from pipeline.training.weight_average import WeightAverage
from pipeline.weights.checkpoints import read

SETTINGS = ["ema=0.9", "baseline.schedule.scratch.steps=5", "baseline.checkpoint_every=2"]


def test_it_is_the_moving_average_and_takes_the_parameters_place() -> None:
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    expected = float(model.weight)
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.values.keys() == {"weight"}
    average.apply()
    assert float(model.weight) == pytest.approx(expected, rel=1e-6)


def test_a_resumed_segment_publishes_the_same_average(runs: Path, tmp_path: Path) -> None:
    whole, cut = mini_chain(runs, "baseline", SETTINGS), mini_chain(tmp_path / "cut", "baseline", SETTINGS)
    run_chain(whole)
    for step in (1, 4):
        with pytest.raises(Interrupted):
            run_chain(cut, Stop("scratch", step, signal.SIGTERM))
    run_chain(cut)
    assert read(cut.tasks[0].checkpoint).metadata["digest"] == read(whole.tasks[0].checkpoint).metadata["digest"]
