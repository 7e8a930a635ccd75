"""What a segment minimizes, and how a new component takes over from its predecessor.

Every objective is a mean over the samples of a batch, so that N processes with B/N samples each minimize what one
process with B does; and a module, so that whatever wraps it (DDP, torch.compile) sees the whole step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modules import HPCM, Noise
from pipeline.evaluation.metrics import metric_named
from pipeline.evaluation.quality import bits_per_pixel
from pipeline.recipes.registered import OBJECTIVES, ObjectiveTraits


def training_noise(model: HPCM, size: tuple[int, int], seed: int, samples: Sequence[int]) -> Noise:
    """The noise of these samples at image size (H, W): a function of (seed, sample) alone, on the CPU."""
    y_shape, z_shape = model.latent_shapes(*size)
    drawn = []
    for sample in samples:
        state = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        drawn.append([torch.rand(shape, generator=generator) - 0.5 for shape in (y_shape, z_shape)])
    y, z = (torch.stack(part) for part in zip(*drawn, strict=True))
    return Noise(y.contiguous(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last))


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective is made from."""

    child: HPCM
    parent: HPCM | None
    components: tuple[str, ...]
    """Components of the child that differ from the parent's."""
    lmbda: float
    metric: str


class Objective(nn.Module):
    """What a segment minimizes. Registered with `register_objective`."""

    @classmethod
    def build(cls, context: ObjectiveContext) -> "Objective":
        """The objective of a segment."""
        raise NotImplementedError

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Code images (B, 3, H, W); returns the scalar `loss`, a mean over samples, and others to log beside it."""
        raise NotImplementedError


_CLASSES: dict[str, type[Objective]] = {}
ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def register_objective(name: str, traits: ObjectiveTraits) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Register an objective under its name in recipes; raises ValueError for a name that another class has."""

    def add(objective: ObjectiveClass) -> ObjectiveClass:
        if name in _CLASSES and _CLASSES[name].__qualname__ != objective.__qualname__:
            raise ValueError(f"the objective {name!r} is {_CLASSES[name].__qualname__} already")
        OBJECTIVES[name] = traits
        _CLASSES[name] = objective
        return objective

    return add


def build_objective(name: str, context: ObjectiveContext) -> Objective:
    """The objective of this name in recipes."""
    return _CLASSES[name].build(context)


@register_objective("rate-distortion", OBJECTIVES["rate-distortion"])
class RateDistortion(Objective):
    """λ · distortion + bits per pixel, such as λ·255²·MSE + bpp or λ·(1 − MS-SSIM) + bpp.

    Where no transform is trainable the distortion cannot change: g_s is not run and the rate alone is minimized.
    """

    def __init__(self, model: HPCM, lmbda: float, metric: str):
        super().__init__()
        self.model, self.lmbda, self.metric = model, lmbda, metric

    @classmethod
    def build(cls, context: ObjectiveContext) -> "RateDistortion":
        """The loss of the child at the stage's λ."""
        return cls(context.child, context.lmbda, context.metric)

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Code images (B, 3, H, W); returns the scalars `loss`, `bpp` and, where it can change, `distortion`."""
        transforms = (self.model.g_a, self.model.g_s)
        reconstruct = any(p.requires_grad for transform in transforms for p in transform.parameters())
        coded = self.model(images, training=True, noise=noise, reconstruct=reconstruct)
        bpp = bits_per_pixel(coded["likelihoods"], images.shape[0] * images.shape[2] * images.shape[3])
        if not reconstruct:
            return {"loss": bpp, "bpp": bpp}
        metric = metric_named(self.metric)
        assert metric.distortion is not None  # the recipe's schema sees to it
        distortion = metric.distortion(coded["x_hat"], images)
        return {"loss": self.lmbda * metric.weight * distortion + bpp, "bpp": bpp, "distortion": distortion}


@register_objective("align", OBJECTIVES["align"])
class Align(Objective):
    """Trains new components alone: given the inputs of each call in the parent, they learn its output.

    The loss is the mean over calls of squared error / variance of the target, both per image.
    """

    def __init__(self, model: HPCM, parent: HPCM, components: Sequence[str]):
        super().__init__()
        self.model, self.components = model, components
        self._teacher = (parent,)  # In a tuple: not a submodule, so nobody wraps, trains or saves it.

    @classmethod
    def build(cls, context: ObjectiveContext) -> "Align":
        """The alignment of the child's new components with the parent's."""
        assert context.parent is not None  # the schema sees to it
        return cls(context.child, context.parent, context.components)

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Compare on images (B, 3, H, W); returns the scalar `loss`. The noise is not used."""
        with torch.no_grad(), recorded_calls(self._teacher[0], self.components) as sites:
            self._teacher[0](images, training=True, reconstruct=False)
        errors = []
        for name, calls in sites.items():
            component = self.model.get_submodule(name)
            for inputs, target in calls:
                # Autocast leaves both in bfloat16, too coarse for their difference.
                output, target = (x.to(images.dtype).flatten(1) for x in (component(*inputs), target))
                error = (output - target).square().mean(1)
                errors.append((error / target.var(1).clamp_min(1e-12)).mean())
        return {"loss": torch.stack(errors).mean()}


@contextmanager
def recorded_calls(model: HPCM, components: Sequence[str]) -> Iterator[dict[str, list[tuple[Any, Tensor]]]]:
    """Record inputs and output of every call of these components while the context lasts."""
    sites: dict[str, list[tuple[Any, Tensor]]] = defaultdict(list)

    def watch(name: str) -> RemovableHandle:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sites[name].append((inputs, output))

        return model.get_submodule(name).register_forward_hook(record)

    handles = [watch(name) for name in components]
    try:
        yield sites
    finally:
        for handle in handles:
            handle.remove()


class Handover:
    """While it lasts, a new component's output is (1 − a)·parent's + a·new: it starts where the parent ended.

    The parent's components stay outside the child's state dict, frozen; gradients pass through them to their inputs.
    """

    def __init__(self, child: HPCM, parent: HPCM, components: Sequence[str]):
        device = child.means_hyper.device
        self.share = torch.zeros((), device=device)
        """a, from 0 (parent alone) to 1 (child alone)."""
        self._handles = [
            child.get_submodule(name).register_forward_hook(self._blend(parent.get_submodule(name)))
            for name in components
        ]

    def _blend(self, predecessor: nn.Module) -> Any:
        predecessor.requires_grad_(False)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return (1 - self.share) * predecessor(*inputs) + self.share * output

        return hook

    def end(self) -> None:
        """Remove the parent's share."""
        for handle in self._handles:
            handle.remove()
