"""An exponential moving average of the weights: less noisy than the last step's, at no cost in decoding."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of a segment's trainable parameters, by name; it starts as the parameters are.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the weights at the start of a short segment
    do not outlast it.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after a step; `updates` counts those before."""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + updates) / (10 + updates)))
        average(list(self.values.values()), [p.detach() for p in self.parameters.values()], updates)

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Give the parameters their average."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])
