"""The objectives of segments, and the handover from old to new components.

An objective is a mean over the samples of a batch, so N processes with B/N samples each minimize the same value as one
process with B samples. It is a module, so autocast and torch.compile can wrap the whole step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modules import HPCM, Noise
from modules.plugins import note_registration
from pipeline.data.crops import Batch
from pipeline.evaluation.metrics import bits_per_pixel, metric_named
from pipeline.recipes.registered import OBJECTIVES, ObjectiveTraits
from pipeline.recipes.schema import Stage
from pipeline.training.transfer import Migration


def training_noise(model: HPCM, size: tuple[int, int], seed: int, samples: Sequence[int]) -> Noise:
    """The random values of these samples at image size (H, W), on the CPU. They depend only on (seed, sample)."""
    y_shape, z_shape = model.latent_shapes(*size)
    drawn = []
    for sample in samples:
        state = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        drawn.append([torch.rand(shape, generator=generator) for shape in (y_shape, z_shape, ())])
    y, z, rate = (torch.stack(part) for part in zip(*drawn, strict=True))
    y, z = ((part - 0.5).contiguous(memory_format=torch.channels_last) for part in (y, z))
    return Noise(y, z, rate)


def with_noise(model: HPCM, seed: int, batch: Batch) -> Batch:
    """A batch of `training_loader` with the `noise` of its samples. Data workers draw it, so that no step waits."""
    size = (*batch["image"].shape[2:],)
    return {**batch, "noise": training_noise(model, size, seed, batch["sample"].tolist())}


class Objective(nn.Module):
    """A loss that a segment minimizes. Subclasses are registered with `register_objective`."""

    @classmethod
    def build(cls, migration: Migration, stage: Stage) -> "Objective":
        """Build the objective of a segment of a stage."""
        raise NotImplementedError

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Code images (B, 3, H, W). Returns the scalar `loss`, a mean over samples, and other scalars to log."""
        raise NotImplementedError


_CLASSES: dict[str, type[Objective]] = {}
ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])


def register_objective(name: str, traits: ObjectiveTraits) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Register an objective under its name in recipes. Raises ValueError if another class has that name."""

    def add(objective: ObjectiveClass) -> ObjectiveClass:
        if name in _CLASSES and _CLASSES[name].__qualname__ != objective.__qualname__:
            raise ValueError(f"the objective {name!r} is already registered by {_CLASSES[name].__qualname__}")
        OBJECTIVES[name] = traits
        _CLASSES[name] = objective
        note_registration(name, objective.__module__)
        return objective

    return add


def build_objective(name: str, migration: Migration, stage: Stage) -> Objective:
    """Build the objective with this name."""
    return _CLASSES[name].build(migration, stage)


@register_objective("rate-distortion", OBJECTIVES["rate-distortion"])
class RateDistortion(Objective):
    """λ · distortion + bits per pixel, such as λ·255²·MSE + bpp or λ·(1 − MS-SSIM) + bpp.

    Without a trainable transform the distortion cannot change. Then g_s is not run, and only the rate is minimized.
    """

    def __init__(self, model: HPCM, lmbda: float, metric: str):
        super().__init__()
        self.model, self.lmbda, self.metric = model, lmbda, metric

    @classmethod
    def build(cls, migration: Migration, stage: Stage) -> "RateDistortion":
        """Build the loss of the child at the stage's λ, or at all its rates."""
        chosen = RateDistortion if migration.child.rate_vectors is None else EveryRate
        return chosen(migration.child, stage.lmbda, stage.metric)

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Code images (B, 3, H, W). Returns the scalars `loss`, `bpp` and, if it can change, `distortion`."""
        model, metric = self.model, metric_named(self.metric)
        assert metric.distortion is not None  # checked by the recipe's schema
        reconstruct = any(p.requires_grad for transform in (model.g_a, model.g_s) for p in transform.parameters())
        coded = model(images, training=True, noise=noise, reconstruct=reconstruct)
        bpp = bits_per_pixel(coded["likelihoods"], images.shape[0] * images.shape[2] * images.shape[3])
        if not reconstruct:
            return {"loss": bpp, "bpp": bpp}
        distortion = metric.distortion(coded["x_hat"], images)
        return {"loss": self.lmbda * metric.weight * distortion + bpp, "bpp": bpp, "distortion": distortion}


class EveryRate(RateDistortion):
    """The loss of a codec of several rates. Each sample is coded at a quality of its own, and has its λ.

    The loss of a sample is divided by λ / the stage's λ, so distortion weighs as much at every rate. Losses grow with
    λ^0.75, so low rates, which are the hardest to reach from a codec of a higher one, weigh more than others.
    """

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Code images (B, 3, H, W). Returns the scalars `loss`, `bpp` and `distortion`, means over the samples."""
        model, metric = self.model, metric_named(self.metric)
        assert metric.distortion is not None  # checked by the recipe's schema
        with model.at_quality(drawn_quality(noise.rate, len(model.config.rates))):
            coded, rate = model(images, training=True, noise=noise), model.rate
        assert rate is not None  # as `build` chose
        pairs = zip(coded["x_hat"].split(1), images.split(1), strict=True)
        distortion = torch.stack([metric.distortion(*pair) for pair in pairs])
        bits = [-likelihoods.log2().flatten(1).sum(1) for likelihoods in coded["likelihoods"].values()]
        bpp = torch.stack(bits).sum(0) / (images.shape[2] * images.shape[3])
        loss = self.lmbda * (metric.weight * distortion + bpp / rate.lmbda.to(images.dtype))
        return {"loss": loss.mean(), "bpp": bpp.mean(), "distortion": distortion.mean()}


def drawn_quality(uniform: Tensor, rates: int) -> Tensor:
    """Qualities from 1 to `rates`, from values (B,) uniform in [0, 1).

    Half a step to either side of each λ is drawn equally often. What lies beyond the first and the last falls on them.
    """
    return (uniform * rates + 0.5).clamp(1, rates)


@register_objective("align", OBJECTIVES["align"])
class Align(Objective):
    """Trains new components to give the outputs of the parent's components on the same inputs.

    The loss is the mean over calls of squared error / variance of the target, both per image.
    """

    def __init__(self, model: HPCM, parent: HPCM, components: Sequence[str]):
        super().__init__()
        self.model, self.components = model, components
        self._teacher = (parent,)  # In a tuple, so that it is not a submodule: it is not wrapped, trained or saved.

    @classmethod
    def build(cls, migration: Migration, stage: Stage) -> "Align":
        """Build the alignment of the child's new components with the parent's."""
        assert migration.parent is not None  # checked by the recipe's schema
        return cls(migration.child, migration.parent, migration.components)

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Compare on images (B, 3, H, W). Returns the scalar `loss`. The noise is not used."""
        with torch.no_grad(), recorded_calls(self._teacher[0], self.components) as sites:
            self._teacher[0](images, training=True, reconstruct=False)
        errors = []
        for name, calls in sites.items():
            component = self.model.get_submodule(name)
            for inputs, target in calls:
                # Autocast leaves both in bfloat16, which is too coarse for their difference.
                output, target = (x.to(images.dtype).flatten(1) for x in (component(*inputs), target))
                error = (output - target).square().mean(1)
                errors.append((error / target.var(1).clamp_min(1e-12)).mean())
        return {"loss": torch.stack(errors).mean()}


@contextmanager
def recorded_calls(model: HPCM, components: Sequence[str]) -> Iterator[dict[str, list[tuple[Any, Tensor]]]]:
    """Within the context, record inputs and output of every call of these components."""
    sites: dict[str, list[tuple[Any, Tensor]]] = defaultdict(list)
    with ExitStack() as hooks:
        for name in components:
            record = partial(lambda name, module, inputs, output: sites[name].append((inputs, output)), name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(record))
        yield sites


class Handover:
    """Blends the outputs of old and new components: (1 − a) · parent's + a · child's, until `end` is called.

    The parent's components are frozen and not in the child's state dict. Gradients pass through them to their inputs.
    """

    def __init__(self, child: HPCM, parent: HPCM, components: Sequence[str]):
        self.share = torch.zeros((), device=child.means_hyper.device)
        """a, from 0 (only the parent) to 1 (only the child)."""
        self._handles = []
        for name in components:
            blend = partial(self._blend, parent.get_submodule(name).requires_grad_(False))
            self._handles.append(child.get_submodule(name).register_forward_hook(blend))

    def _blend(self, predecessor: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (1 - self.share) * predecessor(*inputs) + self.share * output

    def end(self) -> None:
        """Remove the parent's components from the outputs."""
        for handle in self._handles:
            handle.remove()
