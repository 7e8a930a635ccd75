"""The codec's networks: transforms around a hierarchical progressive context model (HPCM, ICCV 2025)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.compressai_parts import quantize_ste
from modules.config import HPCMConfig, preset_config
from modules.context.coding_order import EIGHTHS, CodeStep, ContextModel, Step, from_rows, hierarchy, to_rows, walk
from modules.context.components import Kind
from modules.context.rates import Rate, RateVectors
from modules.estimator import Estimator
from modules.image_checks import check_form, check_range
from modules.layers.blocks import Checkpointed
from modules.layers.entropy import GeneralizedGaussian
from modules.layers.initialization import center_scales, has_values, initialize_convolutions, spread_latent
from modules.layers.transforms import AnalysisTransform, HyperAnalysis, HyperSynthesis, SynthesisTransform

_GRID_SHIFTS = {
    "attn_s1": 2,
    "attn_s2": 1,
    "attn_s3": 0,
    "context_net": 1,
    "y_spatial_prior_s1_s2": 2,
    "y_spatial_prior_s3": 0,
}
"""For each slot, how many times the latent's sides are halved to give the coarsest grid that the slot works on."""


class Noise(NamedTuple):
    """The random values of one training step.

    Additive noise, uniform in (−½, ½): `y` (B, M, h, w) and `z` (B, N, h/4, w/4). `rate` (B,), uniform in [0, 1), draws
    the rate of each sample for a codec of several rates.
    """

    y: Tensor
    z: Tensor
    rate: Tensor


class HPCMNetwork(nn.Module):
    """The networks of a learned image codec whose latent is coded at three scales in eleven steps.

    A phase is a choice of components in `config`. Parameters and buffers have the names of the published checkpoints.
    """

    cuda_graphs = True
    """Whether a GPU replays the coding steps as CUDA graphs (`modules.bitstream.graphs`)."""

    def __init__(self, config: HPCMConfig | None = None):
        super().__init__()
        self.config = config = config or HPCMConfig()
        M, N = config.M, config.N
        self.means_hyper = nn.Parameter(torch.zeros(1, N, 1, 1))
        self.scales_hyper = nn.Parameter(torch.ones(1, N, 1, 1))
        self.entropy_estimation = GeneralizedGaussian()

        self.g_a = AnalysisTransform(M, config.widths, config.depths, config.transform_hidden_rate)
        self.g_s = SynthesisTransform(M, config.widths, config.depths, config.transform_hidden_rate)
        self.h_a = HyperAnalysis(M, N)
        self.h_s = HyperSynthesis(M, N)

        self.y_spatial_prior_adaptor_list_s1 = self._adaptors(1)
        self.y_spatial_prior_adaptor_list_s2 = self._adaptors(3)
        self.y_spatial_prior_adaptor_list_s3 = self._adaptors(6)
        self.y_spatial_prior_s1_s2 = config.y_spatial_prior_s1_s2.build(M)
        self.y_spatial_prior_s3 = config.y_spatial_prior_s3.build(M)
        self.adaptive_params_list = nn.ParameterList(torch.ones(1, 3 * M, 1, 1) for _ in range(10))
        self.attn_s1, self.attn_s2, self.attn_s3 = (
            kind.build(M) for kind in (config.attn_s1, config.attn_s2, config.attn_s3)
        )
        self.context_net = nn.ModuleList(config.context_net.build(M) for _ in range(2))
        layers = self.g_a.layer_channels, self.g_s.layer_channels
        self.rate_vectors = RateVectors(config.rates, M, *layers) if config.rates else None
        self.quality: float | Tensor = (1 + len(config.rates)) / 2 if config.rates else 1.0
        if has_values(self.means_hyper):
            initialize_convolutions(self)
            # h_s ends in a residual block that adds to its input, so the transposed convolution before it is the head.
            center_scales([self.h_s.branch[:-1], self.y_spatial_prior_s1_s2, self.y_spatial_prior_s3], M)
            spread_latent(self.g_a, self.g_s)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_preset(cls, name: str, phase: int = 0, **overrides: Any) -> Self:
        """Build preset `base`, `large`, `phi-context` or `tiny` at phase 0 (Baseline) to 4, untrained.

        The new components are as wide as in the original design. The recipes in `stages/` narrow them by `overrides`:
        `tiny` at Phase 4 has 4.13 M parameters here, and 2.37 M in the recipe `tiny`.
        """
        return cls(preset_config(name, phase, **overrides))

    @classmethod
    def on_meta(cls, config: HPCMConfig) -> Self:
        """Build the codec on the meta device: its tensors have shapes, but no values and no memory."""
        with torch.device("meta"):
            return cls(config).to("meta")  # CompressAI's LowerBound ignores the default device.

    def _adaptors(self, count: int) -> nn.ModuleList:
        channels = 3 * self.config.M
        return nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(count))

    @property
    def downsampling_factor(self) -> int:
        """Height and width are padded to multiples of this: 128 pixels, or more if attention windows need it."""
        kinds = self.config.components
        needed = (kinds[slot].grid_multiple << shift for slot, shift in _GRID_SHIFTS.items())
        return 16 * math.lcm(8, *needed)

    def components(self) -> dict[str, Kind]:
        """The kind of each context component, by the name of its module."""
        kinds = self.config.components
        fusions = {f"context_net.{number}": kinds["context_net"] for number in range(len(self.context_net))}
        return {**{slot: kind for slot, kind in kinds.items() if slot != "context_net"}, **fusions}

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Choose whether the components' blocks recompute their activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.use_checkpoint = on

    def check_quality(self, quality: float) -> None:
        """Raise ValueError unless the codec has this quality: 1, or with R rates 1 to R, fractions included."""
        highest = max(1, len(self.config.rates))
        if not 1 <= quality <= highest:
            has = f"qualities from 1 to {highest}" if highest > 1 else "one rate, and no other quality than 1"
            raise ValueError(f"quality {quality:g}: this codec has {has}")

    @contextmanager
    def at_quality(self, quality: float | Tensor | None) -> Iterator[None]:
        """Code at a quality, or each sample at its own, (B,), within the context; None keeps the present one.

        Raises ValueError for a number that the codec does not have. The values of a tensor are not checked.
        """
        before = self.quality
        if quality is not None:
            if not isinstance(quality, Tensor):
                self.check_quality(quality)
            self.quality = quality
        try:
            yield
        finally:
            self.quality = before

    def at_lmbda(self, lmbda: float) -> AbstractContextManager[None]:
        """Code at the quality of a λ within the context. Raises ValueError if the codec does not have that λ."""
        return self.at_quality(None if self.rate_vectors is None else self.rate_vectors.quality_of(lmbda))

    @property
    def rate(self) -> Rate | None:
        """The vectors of the present quality; None for a codec of one rate."""
        if self.rate_vectors is None:
            return None
        return Rate(self.rate_vectors, torch.as_tensor(self.quality, device=self.means_hyper.device).reshape(-1))

    def latent_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes of y (M, h, w) and z (N, h/4, w/4) for an image of this size, after padding."""
        factor = self.downsampling_factor
        h, w = (-(-size // factor) * factor // 16 for size in (height, width))
        return (self.config.M, h, w), (self.config.N, h // 4, w // 4)

    def check_images(self, images: Tensor, wait: bool = False) -> None:
        """Raise TypeError or ValueError unless images are (B, 3, H, W) in [0, 1], in the type of the weights.

        The values of images on a GPU are checked only with `wait`, so that a training step need not wait for them.
        """
        check_form(images, self.means_hyper.dtype)
        if wait or (images.device.type == "cpu" and not torch.compiler.is_compiling()):
            check_range(images)

    def forward(
        self,
        images: Tensor,
        training: bool | None = None,
        noise: Noise | None = None,
        reconstruct: bool = True,
    ) -> dict[str, Any]:
        """Reconstruct `images` (B, 3, H, W) in [0, 1], of any H and W, and estimate the likelihoods of their symbols.

        `training` (default: the module's mode) selects straight-through rounding for the latents and additive noise
        for the likelihoods. `noise` fixes that noise. Returns `x_hat` (B, 3, H, W), unclipped (None unless
        `reconstruct`), `y_hat` and `scales` (B, M, h, w), and `likelihoods` with `y` (B, M, h, w) and
        `z` (B, N, h/4, w/4). Raises what `check_images` raises.
        """
        self.check_images(images)
        training = self.training if training is None else training
        y = self.analyzed(images).to(images.dtype)
        z_residual = self.h_a(y).to(images.dtype) - self.means_hyper
        z_hat = (quantize_ste(z_residual) if training else z_residual.round()) + self.means_hyper

        estimator = Estimator(self.symbol_rows(y), training)
        y_hat = self.walk(z_hat, estimator)
        residual, scales = (
            from_rows(rows, *y.shape[2:]) for rows in estimator.collected(hierarchy(*y.shape[2:], y.device).restore)
        )
        if training:
            if noise is None:
                y_noise, z_noise = (torch.rand_like(tensor) - 0.5 for tensor in (residual, z_residual))
                noise = Noise(y_noise, z_noise, rate=y_noise.new_zeros(len(y_noise)))
            residual, z_residual = residual + noise.y, z_residual + noise.z
        else:
            residual, z_residual = residual.round(), z_residual.round()
        likelihoods = {
            "y": self.entropy_estimation(residual, scales),
            "z": self.entropy_estimation(z_residual, self.scales_hyper),
        }
        x_hat = self.synthesized(y_hat, images.shape) if reconstruct else None
        return {"x_hat": x_hat, "y_hat": y_hat, "scales": scales, "likelihoods": likelihoods}

    def padded(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) with their last row and column repeated up to multiples of `downsampling_factor`."""
        factor = self.downsampling_factor
        bottom, right = (-size % factor for size in images.shape[2:])
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        return images.contiguous(memory_format=torch.channels_last)

    def analyzed(self, images: Tensor) -> Tensor:
        """The latent y (B, M, h, w) of images (B, 3, H, W), before rounding."""
        rate = self.rate
        y: Tensor = self.g_a(self.padded(images), rate and rate.g_a)
        return y

    def synthesized(self, y_hat: Tensor, shape: Sequence[int]) -> Tensor:
        """The images of ŷ (B, M, h, w), not clipped. They are cut to the last two numbers of `shape`, (…, H, W)."""
        rate = self.rate
        x_hat: Tensor = self.g_s(y_hat, rate and rate.g_s)
        return x_hat[:, :, : shape[-2], : shape[-1]]

    def symbol_rows(self, y: Tensor) -> Tensor:
        """The rows of y (B, M, h, w), as `coding_order` orders them, in the units in which symbols are rounded."""
        rows, rate = to_rows(y, self.config.M // EIGHTHS), self.rate
        return rows if rate is None else rate.in_symbols(rows)

    def walk(
        self,
        z_hat: Tensor,
        code: CodeStep,
        adapt: Callable[[ContextModel], ContextModel] = lambda model: model,
    ) -> Tensor:
        """Run h_s, then `code` on each step of the hierarchy in order. Maps ẑ (B, N, h/4, w/4) to ŷ (B, M, h, w).

        `code` works in the units of symbols. `adapt` may wrap the context model.
        """
        hyper, rate = self.h_s(z_hat).to(z_hat.dtype), self.rate
        model: ContextModel = self if rate is None else _AtRate(self, rate)
        return walk(adapt(model), hyper, code if rate is None else rate.coded(code))

    def fuse(self, scale: int, context: Tensor) -> Tensor:
        """The first context of scale 1 or 2 from the coarser context and the hyper-prior, both (B, 2M, h, w)."""
        fused: Tensor = self.context_net[scale - 1](context)
        return fused.to(context.dtype)

    def predict(
        self, step: Step, context: Tensor, y_hat: Tensor, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scales and means of a step, and the context of the next, as `ContextModel` describes it.

        `factor` (B or 1, 3M, 1, 1) multiplies the step's vector.
        """
        assert step.adaptor is not None
        adaptors, prior, attention = self.scale_components(step.scale)
        adapted = adaptors[step.adaptor](torch.cat((context, y_hat), dim=1))
        vector = self.adaptive_params_list[step.number - 1]
        parameters = prior(adapted, vector if factor is None else vector * factor).to(context.dtype)
        if step.number < 10:  # No step needs the context after the last.
            context = attention(parameters, context).to(context.dtype)
        return parameters, context

    def scale_components(self, scale: int) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
        """The adaptors, the prior and the attention cell of a scale, 0 (coarsest) to 2."""
        return (
            (self.y_spatial_prior_adaptor_list_s1, self.y_spatial_prior_s1_s2, self.attn_s1),
            (self.y_spatial_prior_adaptor_list_s2, self.y_spatial_prior_s1_s2, self.attn_s2),
            (self.y_spatial_prior_adaptor_list_s3, self.y_spatial_prior_s3, self.attn_s3),
        )[scale]


class _AtRate:
    """The context model of a network at one rate."""

    def __init__(self, network: HPCMNetwork, rate: Rate):
        self.network, self.factors, self.fuse = network, rate.steps[..., None, None], network.fuse

    def predict(self, step: Step, context: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """As `ContextModel` describes it."""
        return self.network.predict(step, context, y_hat, self.factors[:, step.number - 1])
