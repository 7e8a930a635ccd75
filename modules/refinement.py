"""Refines the latent of one image before it is coded: a slower encoder for smaller files and the same decoder.

g_a and h_a compute a latent in one pass. It serves all images well and none best. Gradient descent on y and z of this
image, with the weights fixed, lowers its loss bpp + λ·255²·MSE further (Campos et al., CVPR Workshops 2019; Yang et
al., NeurIPS 2020). `stages/evidence/README.md` lists the methods that were compared.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.compressai_parts import quantize_ste
from modules.context.coding_order import ContextModel, Step
from modules.estimator import Estimator
from modules.network import HPCMNetwork

ITERATIONS = (0, 5, 10, 30, 100)
"""The number of iterations of each effort, 0 … 4."""

_MOMENTUM = 0.6

_WIDEST = 0.35
"""The widest step for a λ below the codec's own, in quantization bins, unless the step for its own λ is wider."""

_SMOOTHING = 0.25
"""The rate is differentiated as the mean of the rates at ± this distance from the residual, which has no jumps."""

GoOn = Callable[[int, int], bool]
"""Called before each iteration with its number, from 0, and the number of all. Returns whether to go on."""


class Schedule(NamedTuple):
    """How a latent is refined: for which λ and in how many iterations. Both `step` and `pull` fall to 0 as a cosine."""

    lmbda: float
    iterations: int
    step: float
    """Root mean square of the first change, in quantization bins."""
    pull: float
    """The part of the way to its rounded value that the first iteration moves the latent.

    Rounding passes gradients straight through, so values gather at the boundary between two symbols, where every small
    change of the context flips them. The pull lets each settle at one symbol.
    """

    @classmethod
    def of(cls, lmbda: float, iterations: int, shift: float = 0.0) -> Self:
        """The schedule for a codec's own λ, or for one that is exp(shift) times as large.

        Large steps pay at high rates, in few iterations, and where λ is far from the one that g_a was trained for.
        For a smaller λ they grow up to `_WIDEST`, because few iterations with wider steps meet nothing better.
        """
        step = 1.05 * lmbda**0.7 * (30 / max(iterations, 1)) ** 0.2
        widest = math.inf if shift > 0 else max(step, _WIDEST)
        first = min(step * math.exp(0.7 * abs(shift)), widest)
        return cls(lmbda * math.exp(shift), iterations, first, min(2 * step, 0.15))


class Latent(NamedTuple):
    """What is coded of an image, before rounding: `y` (1, M, h, w) and `z` (1, N, h/4, w/4)."""

    y: Tensor
    z: Tensor


def refine(network: HPCMNetwork, image: Tensor, schedule: Schedule, go_on: GoOn, latent: Latent) -> Latent:
    """The latent with the lowest loss that gradient descent meets, or the given one if that is the best.

    `image` is (1, 3, H, W) in [0, 1], not padded; `latent` is that of the padded image. The loss is that of rounded
    symbols and of the clipped reconstruction. The rate is estimated from likelihoods.
    """
    if not schedule.iterations:
        return latent
    best, lowest = latent, math.inf
    with torch.inference_mode(False), torch.enable_grad(), _frozen(network):
        variables = [tensor.detach().clone() for tensor in latent]
        velocities = [torch.zeros_like(tensor) for tensor in variables]
        # A codec of several rates has wider bins of y at low rates. There the steps are wider too.
        sizes = (1.0 if network.rate is None else max(1.0, float(network.rate.inverse_gain.mean())), 1.0)
        for iteration in range(schedule.iterations):
            if not go_on(iteration, schedule.iterations):
                return best
            candidate = Latent(*(tensor.requires_grad_() for tensor in variables))
            loss, smooth, rounded = _losses(network, image, candidate, schedule.lmbda)
            if loss < lowest:
                best, lowest = Latent(*(tensor.detach() for tensor in candidate)), loss
            decay = (1 + math.cos(math.pi * iteration / schedule.iterations)) / 2
            pull = decay * schedule.pull
            step = decay * schedule.step / (1 - _MOMENTUM ** (iteration + 1))
            directions = [_normalized(gradient) for gradient in torch.autograd.grad(smooth, candidate)]
            velocities = [v.lerp(d, 1 - _MOMENTUM) for v, d in zip(velocities, directions, strict=True)]
            moved = [t.detach() - step * size * v for t, v, size in zip(candidate, velocities, sizes, strict=True)]
            variables = [t.lerp(center, pull) for t, center in zip(moved, rounded, strict=True)]
        candidate = Latent(*variables)
        with torch.no_grad():
            loss, *_ = _losses(network, image, candidate, schedule.lmbda)
    return candidate if loss < lowest else best


def _normalized(gradient: Tensor) -> Tensor:
    """The gradient with a root mean square of 1. Adam, which normalizes each value, gained less with equal steps."""
    return gradient / gradient.square().mean().sqrt().clamp_min(1e-30)


def _losses(network: HPCMNetwork, image: Tensor, latent: Latent, lmbda: float) -> tuple[float, Tensor, Latent]:
    """The loss of the rounded latent; the loss to differentiate, whose rate is smooth; the rounded latent."""
    recompute = image.shape[2] * image.shape[3] > (16 * network.g_s.tile) ** 2
    z_residual = latent.z - network.means_hyper
    estimator = Estimator(network.symbol_rows(latent.y), training=True)
    z_hat = quantize_ste(z_residual) + network.means_hyper
    y_hat = network.walk(z_hat, estimator, _Recomputed if recompute else lambda model: model)
    x_hat = network.synthesized(y_hat, image.shape).clamp(0, 1)
    distortion = lmbda * 255**2 * (x_hat - image).square().mean()
    symbols = [(torch.cat(estimator.residuals, dim=1), torch.cat(estimator.scales, dim=1))]
    symbols.append((z_residual, network.scales_hyper))
    pixels = image.shape[2] * image.shape[3]
    with torch.no_grad():
        bits = sum(_bits(network, residual.round(), scales) for residual, scales in symbols)
    smooth_bits = sum(
        (_bits(network, residual - _SMOOTHING, scales) + _bits(network, residual + _SMOOTHING, scales)) / 2
        for residual, scales in symbols
    )
    loss = float(distortion.detach() + bits / pixels)
    return loss, distortion + smooth_bits / pixels, Latent(y_hat.detach(), z_hat.detach())


def _bits(network: HPCMNetwork, residual: Tensor, scales: Tensor) -> Tensor:
    likelihoods: Tensor = network.entropy_estimation(residual, scales)
    return -likelihoods.log2().sum()


class _Recomputed:
    """A context model that computes its activations again in the backward pass, so that few are kept."""

    def __init__(self, model: ContextModel):
        self.model, self.fuse = model, model.fuse

    def predict(self, step: Step, context: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's `predict` returns."""
        predicted: tuple[Tensor, Tensor] = checkpoint(
            self.model.predict, step, context, y_hat, use_reentrant=False, preserve_rng_state=False
        )
        return predicted


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient. Then layers keep less for the backward pass."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
