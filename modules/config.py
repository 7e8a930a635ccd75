"""What a codec is made of: sizes, and the kind of each context component. A preset and a phase name one."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

Attention = Literal["cross-attention", "rwkv", "none"]
Fusion = Literal["conv", "rwkv"]
Prior = Literal["dwconv", "rwkv"]
_KINDS = {
    ("attn_s1", "attn_s2", "attn_s3"): Attention,
    ("context_net",): Fusion,
    ("y_spatial_prior_s1_s2", "y_spatial_prior_s3"): Prior,
}


@dataclass(frozen=True)
class HPCMConfig:
    """Every choice that shapes an HPCM; the defaults are HPCM-Base's Baseline."""

    M: int = 320
    """Channels of the latent y."""
    N: int = 256
    """Channels of the hyper-latent z."""
    widths: tuple[int, int, int] = (96, 192, 384)
    """Channels of g_a at 1/2, 1/4 and 1/8 of the image."""
    depths: tuple[int, int, int] = (2, 2, 4)
    """PConvRBs of g_a at those three."""
    heads: int = 32
    windows: tuple[int, int, int] = (4, 8, 8)
    """Sides of the attention windows of s1, s2, s3, on each scale's own grid."""
    prior_depths: tuple[tuple[int, int], tuple[int, int]] = ((2, 1), (3, 2))
    """DWConvRBs in branch_1 and branch_2, of the priors of s1 and s2, and of s3."""

    attn_s1: Attention = "cross-attention"
    attn_s2: Attention = "cross-attention"
    attn_s3: Attention = "cross-attention"
    context_net: Fusion = "conv"
    y_spatial_prior_s1_s2: Prior = "dwconv"
    y_spatial_prior_s3: Prior = "dwconv"

    attn_hidden_rates: tuple[float, float, float] = (2, 3, 4)
    fusion_blocks: int = 1
    fusion_hidden_rate: float = 4
    prior_blocks: tuple[int, int] = (2, 3)
    """RWKV blocks in branch_1, of the priors of s1 and s2, and of s3."""
    prior_last_blocks: tuple[int, int] = (1, 2)
    """The same in branch_2."""
    prior_hidden_rate: float = 4
    mix_rate: float = 1
    """Channels of keys, values and receptances in every RWKV block, by the block's own."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "windows", "attn_hidden_rates", "prior_blocks", "prior_last_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        first, second = self.prior_depths
        object.__setattr__(self, "prior_depths", (tuple(first), tuple(second)))
        for names, kinds in _KINDS.items():
            for name in names:
                if getattr(self, name) not in get_args(kinds):
                    raise ValueError(f"{name} = {getattr(self, name)!r}: there are {', '.join(get_args(kinds))}")
        if self.M % 8:
            raise ValueError(f"M = {self.M} must be a multiple of 8: the hierarchy codes channels in eighths")
        if "cross-attention" in self.attentions and (self.heads < 1 or 2 * self.M % self.heads):
            raise ValueError(f"2M = {2 * self.M} channels do not divide into {self.heads} attention heads")

    @property
    def attentions(self) -> tuple[Attention, Attention, Attention]:
        """Kinds of the attention cells, coarse to fine."""
        return self.attn_s1, self.attn_s2, self.attn_s3

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_dict` takes back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HPCMConfig":
        """The configuration of `to_dict`; raises ValueError for a key that is none."""
        return replace(cls(), **_known(values))


PRESETS: dict[str, HPCMConfig] = {
    "base": HPCMConfig(),
    "large": HPCMConfig(depths=(2, 2, 8), prior_depths=((2, 2), (4, 3))),
    "phi-context": HPCMConfig(attn_s1="none", attn_s2="none", attn_s3="none"),
    "tiny": HPCMConfig(M=48, N=32, widths=(32, 64, 128), depths=(1, 1, 2), heads=8, windows=(2, 4, 4)),
}

_PHASES: tuple[dict[str, str], ...] = (
    {},
    {"attn_s3": "rwkv"},
    {"attn_s1": "rwkv", "attn_s2": "rwkv"},
    {"context_net": "rwkv"},
    {"y_spatial_prior_s1_s2": "rwkv", "y_spatial_prior_s3": "rwkv"},
)


def preset_config(name: str, phase: int = 0, **overrides: Any) -> HPCMConfig:
    """The configuration of a preset at a phase (0 = Baseline … 4), with single fields overridden.

    Raises ValueError for an unknown preset, phase or field, naming the ones there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    if phase not in range(len(_PHASES)):
        raise ValueError(f"unknown phase {phase!r}; there are 0 (Baseline) to {len(_PHASES) - 1}")
    replaced = {key: kind for change in _PHASES[: phase + 1] for key, kind in change.items()}
    return replace(PRESETS[name], **{**replaced, **_known(overrides)})


def preset_of(config: HPCMConfig) -> tuple[str, int]:
    """Preset and phase of a configuration; raises StopIteration for one with overrides."""
    every = ((name, phase) for name in PRESETS for phase in range(len(_PHASES)))
    return next(found for found in every if preset_config(*found) == config)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(HPCMConfig)]
    for key in values:
        if key not in names:
            raise ValueError(f"HPCM has no setting {key!r}; there are {', '.join(names)}")
    return values
