"""An exponential moving average of the weights. It has less noise than the last step and costs nothing in decoding."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of a segment's trainable parameters, by name. It starts at their initial values.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the initial weights do not dominate a short
    segment.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Update after a step. `updates` is the number of earlier updates."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
        average(list(self.values.values()), [p.detach() for p in self.parameters.values()], updates)

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the values of the average while the context lasts."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.values)
        try:
            yield
        finally:
            self._set(trained)

    def apply(self) -> None:
        """Copy the average into the parameters."""
        self._set(self.values)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
