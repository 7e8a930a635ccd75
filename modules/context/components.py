"""Context components: their base classes, and the registry of their kinds.

A codec has six slots for context components (`SLOTS`). A slot takes one kind of its group. A kind is a frozen
dataclass whose fields are its settings. It builds the module, and it lists which weights the module takes over from
each kind that it can replace.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from torch import nn

from modules.layers.blocks import LinearLayer
from modules.plugins import load_installed_plugins, note_registration

SLOTS = {
    "attn_s1": "attention",
    "attn_s2": "attention",
    "attn_s3": "attention",
    "context_net": "fusion",
    "y_spatial_prior_s1_s2": "prior",
    "y_spatial_prior_s3": "prior",
}
"""The group of kinds that each slot takes. `context_net` holds two modules of one kind.

An attention cell maps (prior's output, context), each (B, 2M, H, W), to the next context (B, 2M, H, W). A fusion maps
(B, 2M, H, W) to the same shape. A prior maps (B, 3M, H, W) and the step's vector q (1, 3M, 1, 1) to (B, 2M, H, W).
"""


class Component(nn.Module):
    """A context component, which a migration can put in the place of another."""

    def start_as_identity(self) -> None:
        """Initialize so that, once weights are taken over, the output is as close to the predecessor's as possible."""

    @property
    def last_linear(self) -> LinearLayer | None:
        """The linear layer or 1×1 convolution that produces the output, or None."""
        return None


@dataclass(frozen=True)
class Kind:
    """Settings of a component. Subclasses are frozen dataclasses, registered with `register`."""

    group: ClassVar[str]
    name: ClassVar[str]
    least: ClassVar[Mapping[str, int]] = {}
    """The least value of a setting, if it is not 0."""

    def __post_init__(self) -> None:
        """Raise ValueError unless each setting of type `int` or `float` is such a number, at least its least value."""
        forms: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}
        for setting in fields(self):
            value: Any = getattr(self, setting.name)
            low, form = self.least.get(setting.name, 0), forms.get(setting.type)
            if form and (type(value) not in form or not low <= value < 2**20):  # True is no number.
                what = f"{'a whole number' if setting.type is int else 'a number'} of at least {low}"
                raise ValueError(f"{setting.name} = {value!r} of the kind {self.name!r}: expected {what}")

    def build(self, M: int) -> nn.Module:
        """Build the component for a codec whose latent has M channels."""
        raise NotImplementedError(f"{type(self).__name__} needs a method build(self, M)")

    def takes_over(self, predecessor: "Kind") -> dict[str, str]:
        """The weights to take over: a mapping from prefixes of names in the predecessor to prefixes of names here.

        A prefix consists of whole parts of a dotted name. `{i}` stands for one part, and the empty prefix for the whole
        component. A tensor is not taken over if its shape differs. By default a component takes over everything from
        its own kind and nothing from other kinds.
        """
        return {"": ""} if type(predecessor) is type(self) else {}

    @property
    def grid_multiple(self) -> int:
        """Height and width of the slot's grid must be multiples of this."""
        return 1

    @property
    def num_blocks(self) -> int:
        """Number of equal blocks in the component. A file of its weights holds at least as many tensors."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """A mapping of `kind` and the settings that JSON can hold and `kind_from` accepts."""
        return {"kind": self.name, **asdict(self)}


GROUPS = tuple(dict.fromkeys(SLOTS.values()))
_KINDS: dict[str, dict[str, type[Kind]]] = {group: {} for group in GROUPS}
KindClass = TypeVar("KindClass", bound=type[Kind])


def register(group: str, name: str) -> Callable[[KindClass], KindClass]:
    """Register a kind for the slots of a group (`attention`, `fusion` or `prior`).

    Raises ValueError for an unknown group, and for a name that another class already has.
    """

    def add(kind: KindClass) -> KindClass:
        if group not in _KINDS:
            raise ValueError(f"no group {group!r} of components; there are {', '.join(_KINDS)}")
        known = _KINDS[group].setdefault(name, kind)
        if known is not kind and known.__qualname__ != kind.__qualname__:
            raise ValueError(f"the {group} kind {name!r} is already {known.__module__}.{known.__qualname__}")
        note_registration(name, kind.__module__)
        kind.group, kind.name = group, name
        _KINDS[group][name] = kind
        return kind

    return add


def kinds(group: str) -> Mapping[str, type[Kind]]:
    """The registered kinds of a group, by name."""
    return _KINDS[group]


def kind_names() -> frozenset[str]:
    """The names of all registered kinds."""
    return frozenset(name for group in _KINDS.values() for name in group)


def kind_from(slot: str, choice: "Kind | str | Mapping[str, Any]", current: Kind | None = None) -> Kind:
    """Make a Kind of `choice`: a Kind, a kind's name, or a mapping of `kind` and settings.

    A mapping without `kind`, or with the kind of `current`, changes only the given settings of `current`. Raises
    ValueError, which names the slot, for an unknown kind or setting and for a kind of another group.
    """
    group = SLOTS[slot]
    if isinstance(choice, Kind):
        if choice.group != group:
            raise ValueError(f"{slot}: {choice.name!r} is a kind of {choice.group}; the slot takes one of {group}")
        return choice
    if not isinstance(choice, str | Mapping):
        raise ValueError(f"{slot}: expected a kind, or a mapping of its settings, not {choice!r}")
    settings = {"kind": choice} if isinstance(choice, str) else dict(choice)
    name = settings.pop("kind", current.name if current else None)
    kind = _kind_named(group, name, slot)
    known = {field.name: field for field in fields(kind)}
    for key in settings:
        if key not in known:
            raise ValueError(f"{slot}: the kind {name!r} has no setting {key!r}{nearest(key, known)}")
    if current is not None and current.name == name:
        settings = {**asdict(current), **settings}
    missing = [key for key, field in known.items() if field.default is MISSING and key not in settings]
    if missing:
        raise ValueError(f"{slot}: the kind {name!r} needs the setting {missing[0]!r}")
    return kind(**settings)


def settings_of_kinds(group: str, choices: Any) -> Mapping[str, Any]:
    """Check that `choices` maps names of this group's kinds to settings, and return it; else raise ValueError."""
    if not isinstance(choices, Mapping):
        raise ValueError(f"{group}: expected settings by kind, such as {{{next(iter(_KINDS[group]))}: {{…}}}}")
    for name, settings in choices.items():
        _kind_named(group, name, group)
        if not isinstance(settings, Mapping) or "kind" in settings:
            raise ValueError(f"{group}: {name}: expected a mapping of settings")
    return choices


def _kind_named(group: str, name: object, where: str) -> type[Kind]:
    if not isinstance(name, str) or name not in _KINDS[group]:
        load_installed_plugins()
    if not isinstance(name, str) or name not in _KINDS[group]:
        own = "a kind of your own needs its module in `plugins` of the recipe or in HPCM_PLUGINS"
        raise ValueError(f"{where}: no kind {name!r}{nearest(name, _KINDS[group])} ({own})")
    return _KINDS[group][name]


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known word, or all if none is near."""
    names = list(known)
    hint = get_close_matches(str(word), names, n=1)
    return f"; did you mean {hint[0]!r}?" if hint else f"; there are {', '.join(names) or 'none'}"
