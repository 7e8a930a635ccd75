"""What blocks have in common: they can recompute their activations, and some of them can be narrowed."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LinearLayer = nn.Linear | nn.Conv2d
"""A linear layer, or a 1×1 convolution used as one."""


class Checkpointed(nn.Module):
    """A block that recomputes its activations in the backward pass if `use_checkpoint` is set."""

    use_checkpoint = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._compute, x, use_reentrant=False, preserve_rng_state=False)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Narrowable(nn.Module):
    """A module with inner channels. A narrower copy can keep some of them."""

    whole: ClassVar[tuple[str, ...]] = ()
    """Names of the modules that do not depend on the number of inner channels."""
    inner: ClassVar[tuple[str, ...]]
    """Names of the parameters that have the inner channels as their first dimension."""
    last: ClassVar[str]
    """Name of the linear layer or 1×1 convolution whose inputs are the inner channels."""

    @property
    def last_linear(self) -> LinearLayer:
        """The layer `last`."""
        layer = self.get_submodule(self.last)
        assert isinstance(layer, LinearLayer)
        return layer

    @torch.no_grad()
    def keep_channels(self, wider: "Narrowable", index: Tensor) -> None:
        """Copy what computes the inner channels `index` (width,) of `wider`: all but the last linear layer."""
        for name in self.whole:
            self.get_submodule(name).load_state_dict(wider.get_submodule(name).state_dict())
        for name in self.inner:
            self.get_parameter(name).copy_(wider.get_parameter(name)[index])


def inner_width(rate: float, channels: int) -> int:
    """Inner channels: `rate` times `channels`, rounded, at least 1."""
    return max(1, round(rate * channels))
