"""The configuration of a codec: its sizes and the kind of each context component. Presets and phases name some."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from modules.context.attention import CrossAttentionKind, NoAttentionKind
from modules.context.components import GROUPS, SLOTS, Kind, kind_from, nearest, settings_of_kinds
from modules.context.fusion import ConvFusionKind
from modules.context.priors import DWConvPriorKind
from modules.context.rwkv_kinds import RWKVContextKind, RWKVFusionKind, RWKVPriorKind

MOST_RATES = 63


@dataclass(frozen=True)
class HPCMConfig:
    """The sizes and component kinds of an HPCM. The defaults are HPCM-Base's Baseline.

    A slot accepts a Kind, a kind's name, or a mapping of `kind` and its settings. Raises ValueError for invalid sizes
    and kinds.
    """

    M: int = 320
    """Channels of the latent y."""
    N: int = 256
    """Channels of the hyper-latent z."""
    widths: tuple[int, int, int] = (96, 192, 384)
    """Channels of g_a at 1/2, 1/4 and 1/8 of the image."""
    depths: tuple[int, int, int] = (2, 2, 4)
    """Numbers of PConvRBs of g_a at 1/2, 1/4 and 1/8 of the image."""
    transform_hidden_rate: float = 4
    """Inner width of a PConvRB of g_a and g_s, as a multiple of its channels."""
    rates: tuple[float, ...] = ()
    """The λ between which one codec has every rate, ascending. Empty for a codec of one rate."""

    attn_s1: Kind = field(default=CrossAttentionKind(heads=32, window=4))
    attn_s2: Kind = field(default=CrossAttentionKind(heads=32, window=8))
    attn_s3: Kind = field(default=CrossAttentionKind(heads=32, window=8))
    context_net: Kind = field(default=ConvFusionKind())
    y_spatial_prior_s1_s2: Kind = field(default=DWConvPriorKind(blocks=2, last_blocks=1))
    y_spatial_prior_s3: Kind = field(default=DWConvPriorKind(blocks=3, last_blocks=2))

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for slot in SLOTS:
            object.__setattr__(self, slot, kind_from(slot, getattr(self, slot)))
        if self.M % 8 or self.M < 8:
            raise ValueError(f"M = {self.M} must be a positive multiple of 8: the hierarchy codes channels in eighths")
        if min(self.N, *self.widths) < 1:
            raise ValueError(f"N = {self.N} and widths = {list(self.widths)} must be positive")
        ascending = all(0 < low < high for low, high in pairwise(self.rates))
        if self.rates and not (ascending and 2 <= len(self.rates) <= MOST_RATES):
            raise ValueError(f"rates: give 2 to {MOST_RATES} positive λ in ascending order, not {list(self.rates)}")

    @property
    def components(self) -> dict[str, Kind]:
        """The kind of every slot."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold and `from_dict` accepts. `rates` is left out if there are none."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.rates:
            del values["rates"]
        return {name: value.to_dict() if isinstance(value, Kind) else value for name, value in values.items()}

    def distinguishing(self) -> dict[str, Any]:
        """The entries of `to_dict` that differ from HPCM-Base's Baseline. A kind's default settings are left out."""
        base = type(self)().to_dict()
        values = {name: value for name, value in self.to_dict().items() if value != base.get(name)}
        for slot in values.keys() & SLOTS.keys():
            defaults = {field.name: field.default for field in fields(getattr(self, slot))}
            values[slot] = {key: value for key, value in values[slot].items() if value != defaults.get(key, ...)}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HPCMConfig":
        """Read the output of `to_dict`. Raises ValueError for an unknown key."""
        return cls().changed(**values)

    def changed(self, **changes: Any) -> "HPCMConfig":
        """Return this configuration with some fields replaced.

        For a slot, give a kind or a mapping of the settings to change. For a group, give settings by kind; they apply
        to every slot of the group that has this kind: `prior={"rwkv": {"mix_rate": 0.25}}`. Raises ValueError for an
        unknown field, kind or setting, and lists the known ones.
        """
        names = [field.name for field in fields(self)]
        for key in changes:
            if key not in names and key not in GROUPS:
                raise ValueError(f"HPCM has no setting {key!r}{nearest(key, [*names, *GROUPS])}")
        found = self.components
        for slot, kind in found.items():
            settings = settings_of_kinds(SLOTS[slot], changes.get(SLOTS[slot], {}))
            if kind.name in settings:
                found[slot] = kind_from(slot, settings[kind.name], kind)
        found |= {slot: kind_from(slot, changes[slot], found[slot]) for slot in SLOTS if slot in changes}
        sizes = {key: value for key, value in changes.items() if key not in SLOTS and key not in GROUPS}
        every: dict[str, Any] = {**sizes, **found}
        return replace(self, **every)


_TINY_ATTENTION = [CrossAttentionKind(heads=8, window=window) for window in (2, 4, 4)]
PRESETS: dict[str, HPCMConfig] = {
    "base": HPCMConfig(),
    "large": HPCMConfig(
        depths=(2, 2, 8),
        y_spatial_prior_s1_s2=DWConvPriorKind(blocks=2, last_blocks=2),
        y_spatial_prior_s3=DWConvPriorKind(blocks=4, last_blocks=3),
    ),
    "phi-context": HPCMConfig(attn_s1=NoAttentionKind(), attn_s2=NoAttentionKind(), attn_s3=NoAttentionKind()),
    "tiny": HPCMConfig(
        M=48,
        N=32,
        widths=(32, 64, 128),
        depths=(1, 1, 2),
        attn_s1=_TINY_ATTENTION[0],
        attn_s2=_TINY_ATTENTION[1],
        attn_s3=_TINY_ATTENTION[2],
    ),
}

_PHASES: tuple[dict[str, Kind], ...] = (
    {},
    {"attn_s3": RWKVContextKind(hidden_rate=4)},
    {"attn_s1": RWKVContextKind(hidden_rate=2), "attn_s2": RWKVContextKind(hidden_rate=3)},
    {"context_net": RWKVFusionKind()},
    {
        "y_spatial_prior_s1_s2": RWKVPriorKind(blocks=2, last_blocks=1),
        "y_spatial_prior_s3": RWKVPriorKind(blocks=3, last_blocks=2),
    },
)


def preset_config(name: str, phase: int = 0, **overrides: Any) -> HPCMConfig:
    """The configuration of a preset at a phase (0 = Baseline … 4), with some fields overridden.

    `overrides` are the arguments of `HPCMConfig.changed`.
    Raises ValueError for an unknown preset, phase or field, and lists the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    if phase not in range(len(_PHASES)):
        raise ValueError(f"unknown phase {phase!r}; there are 0 (Baseline) to {len(_PHASES) - 1}")
    replaced: dict[str, Any] = {slot: kind for change in _PHASES[: phase + 1] for slot, kind in change.items()}
    return replace(PRESETS[name], **replaced).changed(**overrides)


def preset_of(config: HPCMConfig) -> tuple[str, int] | None:
    """Preset and phase of a configuration; None if it has overrides."""
    every = ((name, phase) for name in PRESETS for phase in range(len(_PHASES)))
    return next((found for found in every if preset_config(*found) == config), None)
