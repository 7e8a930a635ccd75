"""The moving average of the weights. That a resumed segment continues it is tested in test_validation.py."""

import pytest
import torch

from pipeline.training.weight_average import WeightAverage


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
