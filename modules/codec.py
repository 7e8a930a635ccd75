"""The codec: networks and coding tables, `compress` and `decompress`, as a `CompressionModel` of CompressAI."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from modules.bitstream.coding import Trace, decode, encode, trace
from modules.bitstream.file_format import EPSILON, check_epsilon
from modules.bitstream.quality import split_quality, storable, with_quality
from modules.bitstream.tables import BUFFERS, Tables, built_tables
from modules.compressai_parts import CompressionModel, register_model
from modules.config import HPCMConfig
from modules.layers.entropy import scale_table as default_scale_table
from modules.loading import (
    STEP_VECTORS,
    bare_names,
    checked_config,
    codec_tensors,
    lacks_step_vectors,
    nearest_config,
    state_digest,
)
from modules.pretrained import Pretrained
from modules.refinement import ITERATIONS, GoOn, Latent, Schedule, refine

_logger = logging.getLogger(__name__)


@register_model("hpcm")
class HPCM(Pretrained, CompressionModel):
    """A learned image codec whose latent is coded at three scales in eleven steps.

    A phase is a choice of components in `config`. Parameters and buffers have the names of the published checkpoints.
    """

    filled_with_ones: str | None = None
    """Name of the vectors that the loaded file lacked, as official files of 2025 do; None if it lacked none."""

    lmbda: float | None = None
    """λ of bpp + λ·255²·MSE that the codec was trained for; None if that is not known. Refinement needs it.

    A codec of several rates refines for the λ of the quality at which it codes.
    """

    def __init__(self, config: HPCMConfig | None = None):
        super().__init__(config)
        self.lineage = {}
        for name in BUFFERS:
            dtype = torch.float32 if name == "scale_table" else torch.int32
            self.register_buffer(name, torch.empty(0, dtype=dtype))

    @staticmethod
    def coding_table_names() -> tuple[str, ...]:
        """Names of the buffers that `update` builds from the weights. They are never transferred."""
        return BUFFERS

    @property
    def coding_tables(self) -> Tables:
        """The coding tables. Raises RuntimeError if they have not been built."""
        return Tables.from_buffers(dict(self.named_buffers(recurse=False)))

    def update(self, scale_table: Tensor | None = None, force: bool = False, update_quantiles: bool = False) -> bool:
        """Build the coding tables from the weights. Returns whether they are others than before, or `force`.

        Call it after loading or training. The parameters are those of `CompressionModel.update`;
        `update_quantiles` is ignored. Raises ValueError if a scale is too large for a table.
        """
        scales_of_z, scales_of_y = self.scales_hyper.detach().flatten(), scale_table
        if scales_of_y is None:
            scales_of_y = default_scale_table()
        before, device = dict(self.named_buffers(recurse=False)), self.means_hyper.device
        for name, value in built_tables(self.entropy_estimation, scales_of_z, scales_of_y).items():
            setattr(self, name, value.to(device))
        return force or not all(torch.equal(before[name].cpu(), self.get_buffer(name).cpu()) for name in BUFFERS)

    @torch.no_grad()
    def compress(
        self,
        x: Tensor,
        epsilon: float = EPSILON,
        effort: int = 0,
        go_on: GoOn = lambda *_: True,
        quality: float | None = None,
    ) -> dict[str, Any]:
        """Encode images (B, 3, H, W) in [0, 1]: `strings` [[y of each image], [z of each image]] and `shape` (H, W).

        A decoder reads the same symbols if its scales and the encoder's are both within a relative error of ε of the
        exact scales. ε = 0 gives the shortest strings. With an effort from 1 to 4, each latent is refined in 5, 10, 30
        or 100 iterations, for the rate–distortion loss with `lmbda`. `go_on` can end this early. A codec of several
        rates codes at `quality`, which is stored in the strings of z; None takes the attribute `quality`. Raises
        BitstreamError if the latent holds NaN or values too large to code, ValueError if ε, the effort or the quality
        is out of range or `lmbda` is not known, and what `check_images` raises.
        """
        self.check_images(x, wait=True)
        epsilon = check_epsilon(epsilon)
        with self.at_quality(quality):
            schedule = Schedule.of(self.check_effort(effort), ITERATIONS[effort])
            # One image at a time: rounding may depend on the batch, which a decoder does not know.
            coded = [
                self.strings(image, epsilon, partial(refine, self, image, schedule, go_on)) for image in x.split(1)
            ]
        strings_y, strings_z = (list(strings) for strings in zip(*coded, strict=True))
        return {"strings": [strings_y, strings_z], "shape": x.shape[2:]}

    def strings(
        self, image: Tensor, epsilon: float, refined: Callable[[Latent], Latent] = lambda latent: latent
    ) -> tuple[bytes, bytes]:
        """The strings of y and z of one image (1, 3, H, W). `refined` may replace its latent before it is coded."""
        with self.at_quality(storable(float(self.quality))):
            y, z = encode(self, image, self.coding_tables, epsilon, refined)
            return y, z if self.rate_vectors is None else with_quality(float(self.quality), z)

    def check_effort(self, effort: int) -> float:
        """The λ for an effort from 0 to 4; raises ValueError if the effort is out of range or needs an unknown λ."""
        if not 0 <= effort < len(ITERATIONS):
            raise ValueError(f"effort {effort}: give a number from 0 to {len(ITERATIONS) - 1}")
        if (rate := self.rate) is not None:
            return float(rate.lmbda)
        if effort and not (self.lmbda and self.lmbda > 0):
            raise ValueError("the λ of this codec is not known: give the λ for bpp + λ·255²·MSE")
        return self.lmbda or 0.0

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Any]:
        """Decode the output of `compress`: `x_hat` (B, 3, H, W), clipped to [0, 1], and a `recovery` for each image.

        `recovery` is "" if this machine's rounding was within the encoder's ε; otherwise it says how the image was
        recovered. Raises BitstreamError for damaged strings, for those of another model, and if no recovery succeeds.
        """
        tables, decoded = self.coding_tables, []
        for y, z in zip(*strings, strict=True):
            with self._quality_of(z) as bare_z:
                decoded.append(decode(self, y, bare_z, shape, tables))
        x_hat, recovery = zip(*decoded, strict=True)
        return {"x_hat": torch.cat(x_hat), "recovery": list(recovery)}

    @torch.no_grad()
    def trace(self, y: bytes, z: bytes, shape: tuple[int, int]) -> Trace:
        """Decode one image, and return the scales and symbols with it. Raises BitstreamError instead of recovering.

        `in_float64(model).trace(…)` gives the reference to which the scales of other machines are compared.
        """
        with self._quality_of(z) as bare_z:
            return trace(self, y, bare_z, shape, self.coding_tables)

    @contextmanager
    def _quality_of(self, z: bytes) -> Iterator[bytes]:
        """Code at the quality that a string of z stores. The context's value is the string without it."""
        if self.rate_vectors is None:
            yield z
            return
        quality, bare_z = split_quality(z, len(self.config.rates))
        with self.at_quality(quality):
            yield bare_z

    @classmethod
    def from_tensors(cls, values: Any, tensors: Mapping[str, Tensor], lineage: Mapping[str, Any]) -> Self:
        """Build the codec of these weights and of the configuration that `HPCMConfig.to_dict` wrote.

        `lineage` is what is known of their origin, among it λ. The codec is in evaluation mode, and its coding tables
        are built. Raises ValueError for a configuration that is not valid and for tensors that do not fit it. Nothing
        of the codec's size is allocated before that.
        """
        model = cls(checked_config(values, tensors))
        model.load_state_dict(tensors)
        model.update()
        model.lineage = {**lineage, "digest": state_digest(codec_tensors(model))}
        if model.filled_with_ones:
            model.lineage["filled_with_ones"] = model.filled_with_ones
        lmbda = lineage.get("lmbda") if lineage.get("metric") == "mse" else None
        model.lmbda = lmbda if isinstance(lmbda, float) else None  # A file may say anything.
        return model.eval()

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Self:
        """Build the codec of these weights. The optional entry `config` holds the output of `HPCMConfig.to_dict`.

        Without it, the names and shapes of the tensors show the preset and phase. The names may begin with `module.`.
        Call `update` before coding. Raises RuntimeError, which names the tensors, if no preset and phase fit.
        """
        tensors = bare_names(state_dict)
        known = tensors.pop("config", None)
        model = cls(HPCMConfig.from_dict(known) if known else nearest_config(tensors))
        model.load_state_dict(tensors)
        return model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights. Coding tables take the size that `state_dict` gives them; absent ones become empty.

        With `strict`, step vectors that are all absent become ones, and a message of `logging` says so.
        """
        tables = {name: self.get_buffer(name).new_empty(0) for name in BUFFERS}
        state = {**tables, **state_dict}
        self.filled_with_ones = None
        if strict and lacks_step_vectors(state):
            ones = {name: torch.ones_like(vector) for name, vector in self.adaptive_params_list.named_parameters()}
            state |= {f"{STEP_VECTORS}.{name}": vector for name, vector in ones.items()}
            self.filled_with_ones = STEP_VECTORS
        for name in BUFFERS:
            setattr(self, name, tables[name].new_empty(state[name].shape))
        loaded = nn.Module.load_state_dict(self, state, strict=strict, assign=assign)
        if self.filled_with_ones:
            _logger.warning("%s is absent, as in official files of 2025: its ten vectors are ones", STEP_VECTORS)
        return loaded


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
