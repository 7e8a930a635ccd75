"""The codec: transforms around a hierarchical progressive context model (HPCM, ICCV 2025), in five phases."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.bitstream import coding
from modules.bitstream.coders import Estimator
from modules.bitstream.file_format import EPSILON, check_epsilon
from modules.compressai_parts import CompressionModel, quantize_ste, register_model
from modules.config import PRESETS, HPCMConfig, preset_config
from modules.context.coding_order import Step, from_rows, hierarchy, to_rows
from modules.context.components import Checkpointed, Kind
from modules.image_checks import check_form, check_range
from modules.layers.entropy import GeneralizedGaussian
from modules.layers.entropy import scale_table as default_scale_table
from modules.layers.initialization import center_scales, has_values, initialize_convolutions, spread_latent
from modules.layers.transforms import AnalysisTransform, HyperAnalysis, HyperSynthesis, SynthesisTransform
from modules.pretrained import Pretrained

CodeStep = Callable[[Step, Tensor, Tensor], Tensor]
"""Codes the rows of a step from their scales and means, each (B, R, M/8), and returns ŷ of these rows."""

_TABLES = (
    "scale_table",
    "quantized_cdf_z",
    "cdf_length_z",
    "offset_z",
    "quantized_cdf_y",
    "cdf_length_y",
    "offset_y",
)


_GRID_SHIFTS = (
    ("attn_s1", 2),
    ("attn_s2", 1),
    ("attn_s3", 0),
    ("context_net", 1),
    ("y_spatial_prior_s1_s2", 2),
    ("y_spatial_prior_s3", 0),
)
"""For each slot, how many times the latent's sides are halved to give the coarsest grid that the slot works on."""


class Noise(NamedTuple):
    """Additive noise of one training step, uniform in (−½, ½): `y` (B, M, h, w) and `z` (B, N, h/4, w/4)."""

    y: Tensor
    z: Tensor


@cache
def _shapes(config: HPCMConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in HPCM.on_meta(config).state_dict().items()}


@register_model("hpcm")
class HPCM(Pretrained, CompressionModel):
    """A learned image codec whose latent is coded at three scales in eleven steps.

    A phase is a choice of components in `config`. Parameters and buffers have the names of the published checkpoints.
    """

    saved_config: Mapping[str, Any] | None = None
    """The configuration in the loaded checkpoint, if it has an earlier form."""

    scale_table: Tensor
    quantized_cdf_z: Tensor
    cdf_length_z: Tensor
    offset_z: Tensor
    quantized_cdf_y: Tensor
    cdf_length_y: Tensor
    offset_y: Tensor

    def __init__(self, config: HPCMConfig | None = None):
        super().__init__()
        self.config = config = config or HPCMConfig()
        M, N = config.M, config.N
        self.means_hyper = nn.Parameter(torch.zeros(1, N, 1, 1))
        self.scales_hyper = nn.Parameter(torch.ones(1, N, 1, 1))
        for name in _TABLES:
            dtype = torch.float32 if name == "scale_table" else torch.int32
            self.register_buffer(name, torch.empty(0, dtype=dtype))
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
        if has_values(self.means_hyper):
            self._initialize()
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_preset(cls, name: str, phase: int = 0, **overrides: Any) -> "HPCM":
        """Build preset `base`, `large`, `phi-context` or `tiny` at phase 0 (Baseline) to 4, untrained.

        The new components are as wide as in the original design. The recipes in `stages/` narrow them by `overrides`:
        `tiny` at Phase 4 has 4.13 M parameters here, and 2.37 M in the recipe `tiny`.
        """
        return cls(preset_config(name, phase, **overrides))

    @classmethod
    def on_meta(cls, config: HPCMConfig) -> "HPCM":
        """Build the codec on the meta device: its tensors have shapes, but no values and no memory."""
        with torch.device("meta"):
            return cls(config).to("meta")  # CompressAI's LowerBound ignores the default device.

    @staticmethod
    def nearest_config(shapes: Mapping[str, tuple[int, ...]]) -> HPCMConfig:
        """The preset and phase whose tensors match most of `shapes` by name and shape."""

        def agreement(config: HPCMConfig) -> tuple[int, int]:
            expected = _shapes(config)
            return sum(expected.get(name) == shape for name, shape in shapes.items()), -len(expected)

        return max((preset_config(name, phase) for name in PRESETS for phase in range(5)), key=agreement)

    def _initialize(self) -> None:
        initialize_convolutions(self)
        priors = self.y_spatial_prior_s1_s2, self.y_spatial_prior_s3
        # h_s ends in a residual block that adds to its input, so the transposed convolution before it is the head.
        center_scales([self.h_s.branch[:-1], *priors], self.config.M)
        spread_latent(self.g_a, self.g_s)

    def _adaptors(self, count: int) -> nn.ModuleList:
        channels = 3 * self.config.M
        return nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(count))

    @staticmethod
    def coding_table_names() -> tuple[str, ...]:
        """Names of the buffers that `update` builds from the weights. They are never transferred."""
        return _TABLES

    @property
    def downsampling_factor(self) -> int:
        """Height and width are padded to multiples of this: 128 pixels, or more if attention windows need it."""
        multiples = {slot: kind.grid_multiple for slot, kind in self.config.components.items()}
        needed = (multiples[slot] << shift for slot, shift in _GRID_SHIFTS)
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
        padded = self._pad(images)
        y = self.g_a(padded).to(images.dtype)
        z_residual = self.h_a(y).to(images.dtype) - self.means_hyper
        z_hat = (quantize_ste(z_residual) if training else z_residual.round()) + self.means_hyper
        hyper = self.h_s(z_hat).to(images.dtype)

        estimator = Estimator(to_rows(y, self.config.M // 8), training)
        y_hat = self.walk(hyper, estimator)
        residual, scales = (
            from_rows(rows, *y.shape[2:]) for rows in estimator.collected(hierarchy(*y.shape[2:], y.device).restore)
        )
        if training:
            if noise is None:
                noise = Noise(torch.rand_like(residual) - 0.5, torch.rand_like(z_residual) - 0.5)
            residual, z_residual = residual + noise.y, z_residual + noise.z
        else:
            residual, z_residual = residual.round(), z_residual.round()
        likelihoods = {
            "y": self.entropy_estimation(residual, scales),
            "z": self.entropy_estimation(z_residual, self.scales_hyper),
        }
        x_hat = self._crop(self.g_s(y_hat), images.shape[2:]) if reconstruct else None
        return {"x_hat": x_hat, "y_hat": y_hat, "scales": scales, "likelihoods": likelihoods}

    def _pad(self, images: Tensor) -> Tensor:
        factor = self.downsampling_factor
        bottom, right = (-size % factor for size in images.shape[2:])
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="replicate")
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _crop(x: Tensor, size: torch.Size) -> Tensor:
        return x[:, :, : size[0], : size[1]]

    def walk(self, hyper: Tensor, code: CodeStep) -> Tensor:
        """Run `code` on each step of the hierarchy in order. Maps hyper (B, 2M, h, w) to ŷ (B, M, h, w)."""
        eighth = self.config.M // 8
        hyper_rows = to_rows(hyper, eighth)
        context_rows = y_rows = hyper_rows[:, :0]
        adaptive = iter(self.adaptive_params_list)
        scales = hierarchy(*hyper.shape[2:], hyper.device).scales
        last = scales[-1].steps[-1]  # No later step needs the context after this one.
        for number, scale in enumerate(scales):
            size = scale.height, scale.width
            adaptors, prior, attention = self.scale_components(number)
            context = from_rows(torch.cat((context_rows, hyper_rows), dim=1).index_select(1, scale.context), *size)
            if number > 0:
                context = self.context_net[number - 1](context).to(hyper.dtype)
            empty = hyper.new_zeros(len(hyper), size[0] * size[1] * 8, eighth)
            y_rows = empty.index_copy(1, scale.coarser, y_rows)
            parameters = context
            for step in scale.steps:
                if step.adaptor is not None:
                    decoded = torch.cat((context, from_rows(y_rows, *size)), dim=1)
                    parameters = prior(adaptors[step.adaptor](decoded), next(adaptive)).to(hyper.dtype)
                    if step is not last:
                        context = attention(parameters, context).to(hyper.dtype)
                step_scales, means = to_rows(parameters, eighth).index_select(1, step.parameters).chunk(2, dim=1)
                y_rows = y_rows.index_copy(1, step.local, code(step, step_scales, means))
            context_rows = to_rows(context, eighth)
        return from_rows(y_rows, *size)

    def scale_components(self, scale: int) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
        """The adaptors, the prior and the attention cell of a scale, 0 (coarsest) to 2."""
        return (
            (self.y_spatial_prior_adaptor_list_s1, self.y_spatial_prior_s1_s2, self.attn_s1),
            (self.y_spatial_prior_adaptor_list_s2, self.y_spatial_prior_s1_s2, self.attn_s2),
            (self.y_spatial_prior_adaptor_list_s3, self.y_spatial_prior_s3, self.attn_s3),
        )[scale]

    def update(self, scale_table: Tensor | None = None, force: bool = False, update_quantiles: bool = False) -> bool:
        """Build the coding tables from the weights. Returns whether any were built.

        Call it once after loading or training. The parameters are those of `CompressionModel.update`;
        `update_quantiles` is ignored.
        """
        if len(self.scale_table) and not force:
            return False
        table = default_scale_table() if scale_table is None else scale_table
        built = [table, *self.entropy_estimation.tables(self.scales_hyper.detach().flatten().cpu())]
        built += self.entropy_estimation.tables(table.cpu())
        for name, value in zip(_TABLES, built, strict=True):
            setattr(self, name, value.to(self.means_hyper.device))
        return True

    @torch.no_grad()
    def compress(self, x: Tensor, epsilon: float = EPSILON) -> dict[str, Any]:
        """Encode images (B, 3, H, W) in [0, 1]: `strings` [[y of each image], [z of each image]] and `shape` (H, W).

        A decoder reads the same symbols if its scales and the encoder's are both within a relative error of ε of the
        exact scales. ε = 0 gives the shortest strings. Raises BitstreamError if the latent holds NaN or values too
        large to code, ValueError if ε is out of range, and what `check_images` raises.
        """
        self.check_images(x, wait=True)
        tables, epsilon = coding.Tables.of(self), check_epsilon(epsilon)
        # One image at a time: rounding may depend on the batch, which a decoder does not know.
        coded = [coding.encode(self, self._pad(image), tables, epsilon) for image in x.split(1)]
        strings_y, strings_z = (list(strings) for strings in zip(*coded, strict=True))
        return {"strings": [strings_y, strings_z], "shape": x.shape[2:]}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Any]:
        """Decode the output of `compress`: `x_hat` (B, 3, H, W), clipped to [0, 1], and a `recovery` for each image.

        `recovery` is "" if this machine's arithmetic was within the encoder's ε; otherwise it says how the image was
        recovered. Raises BitstreamError for damaged strings, for those of another model, and if no recovery succeeds.
        """
        tables = coding.Tables.of(self)
        decoded = [coding.decode(self, y, z, shape, tables) for y, z in zip(*strings, strict=True)]
        x_hat, recovery = zip(*decoded, strict=True)
        return {"x_hat": torch.cat(x_hat), "recovery": list(recovery)}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "HPCM":
        """Build the codec of these weights. The optional entry `config` holds the output of `HPCMConfig.to_dict`.

        Without it, the names and shapes of the tensors show the preset and phase. Call `update` before coding. Raises
        RuntimeError, which names the tensors, if no preset and phase fit.
        """
        tensors = {name: value for name, value in state_dict.items() if name != "config"}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        known = state_dict.get("config")
        model = cls(HPCMConfig.from_dict(known) if known else cls.nearest_config(shapes))
        model.load_state_dict(tensors)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. Coding tables take the size that `state_dict` gives them; absent ones become empty."""
        tables = {name: getattr(self, name).new_empty(0) for name in _TABLES}
        state = {**tables, **state_dict}
        for name in _TABLES:
            setattr(self, name, tables[name].new_empty(state[name].shape))
        return nn.Module.load_state_dict(self, state, strict=strict, assign=assign)


def _named(name: str, phase: int) -> Callable[..., HPCM]:
    def build(**overrides: Any) -> HPCM:
        return HPCM.from_preset("base", phase, **overrides)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"HPCM-Base at phase {phase}, untrained. Keyword arguments override fields of `HPCMConfig`."
    return build


HPCM_Baseline = _named("HPCM_Baseline", 0)
HPCM_Phase1 = _named("HPCM_Phase1", 1)
HPCM_Phase2 = _named("HPCM_Phase2", 2)
HPCM_Phase3 = _named("HPCM_Phase3", 3)
HPCM_Phase4 = _named("HPCM_Phase4", 4)
