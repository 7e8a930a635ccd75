"""Transfer: every tensor of parent and child ends in one class, written in a ledger."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modules import HPCM
from pipeline.common.errors import UserError
from pipeline.recipes.schema import Transfer
from pipeline.weights.checkpoints import codec_tensors, tensor_digest

Class = Literal["copied", "renamed", "initialized", "dropped"]


class TransferError(UserError):
    """A tensor or a rename rule that fits nowhere; the message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the child (in the parent, if dropped), the name it came from, its digest afterwards.

    `new` is what a frozen segment trains: what was not copied, and all of a component that the parent does not have.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: Class
    new: bool
    digest: str


@dataclass(frozen=True)
class Ledger:
    """All tensors of parent and child, each once."""

    entries: tuple[Entry, ...]

    @property
    def new(self) -> frozenset[str]:
        """Names of the child's tensors that a frozen segment trains."""
        return frozenset(entry.name for entry in self.entries if entry.new)

    def counts(self) -> dict[str, int]:
        """Number of tensors per class."""
        return dict(Counter(entry.kind for entry in self.entries))

    @classmethod
    def of_root(cls, model: HPCM) -> "Ledger":
        """The ledger of a model that has no parent: everything is initialized."""
        return cls(
            tuple(
                Entry(name, None, tuple(tensor.shape), "initialized", True, tensor_digest(tensor))
                for name, tensor in sorted(codec_tensors(model).items())
            )
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Entries as JSON-able mappings."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_json(cls, entries: list[dict[str, Any]]) -> "Ledger":
        """The ledger that `to_json` wrote."""
        return cls(tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries))


def transfer_weights(parent: HPCM, child: HPCM, rules: Transfer) -> Ledger:
    """Fill `child` from `parent` in place and return the ledger.

    A tensor of the same name and shape is copied; `rules.rename` maps module prefixes of the parent to the child's;
    the rest of the child keeps its own initialization, its new RWKV components starting as the identity unless
    `rules.initialization` is `design`; with `scratch` nothing is copied. Raises TransferError where a rule matches
    nothing or shapes disagree.
    """
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    sources = tensors_to_copy(parent, child, rules)
    new = new_tensors(parent, child, sources)
    if rules.initialization == "function-preserving":
        for name in new_components(parent, child):
            child.rwkv_components()[name].start_as_identity()
    with torch.no_grad():
        for name, source in sources.items():
            ours[name].copy_(theirs[source])

    entries = []
    for name, tensor in ours.items():
        origin = sources.get(name)
        kind: Class = "initialized" if origin is None else "copied" if origin == name else "renamed"
        entries.append(Entry(name, origin, tuple(tensor.shape), kind, name in new, tensor_digest(tensor)))
    for name in theirs.keys() - set(sources.values()):
        entries.append(Entry(name, name, tuple(theirs[name].shape), "dropped", False, tensor_digest(theirs[name])))
    return Ledger(tuple(sorted(entries, key=lambda entry: entry.name)))


def tensors_to_copy(parent: HPCM, child: HPCM, rules: Transfer) -> dict[str, str]:
    """Child's name → parent's name of every tensor that is transferred; raises what `transfer_weights` raises."""
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    sources = _renamed(rules.rename, theirs, ours)
    sources |= {name: name for name in ours if name in theirs and name not in sources}
    if rules.initialization == "scratch":
        sources = {}
    for name, source in sources.items():
        if ours[name].shape != theirs[source].shape:
            raise TransferError(
                f"{name} has shape {list(ours[name].shape)} in the child but {list(theirs[source].shape)} "
                f"as {source} in the parent: the stage's model settings must agree where it keeps a component"
            )
    return sources


def new_tensors(parent: HPCM, child: HPCM, sources: Mapping[str, str]) -> frozenset[str]:
    """The child's tensors that a frozen segment trains: not copied, or of a component that the parent does not have."""
    components = tuple(f"{component}." for component in new_components(parent, child))
    return frozenset(name for name in codec_tensors(child) if sources.get(name) != name or name.startswith(components))


def new_components(parent: HPCM, child: HPCM) -> list[str]:
    """Names of the child's RWKV components that the parent does not have."""
    return [name for name in child.rwkv_components() if name not in parent.rwkv_components()]


def _renamed(rules: Mapping[str, str], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, str]:
    """Child name → parent name, for every tensor under a renamed prefix."""
    sources: dict[str, str] = {}
    for old, new in rules.items():
        pattern = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(old)) + r"(?P<_leaf>\.[^.]+)")
        matches = [match for match in map(pattern.fullmatch, theirs) if match]
        if not matches:
            raise TransferError(f"transfer.rename: {old!r} matches no tensor of the parent")
        for match in matches:
            target = new.format(**match.groupdict()) + match["_leaf"]
            if target not in ours:
                raise TransferError(
                    f"transfer.rename: {old!r} → {new!r} takes {match.string} to {target}, "
                    "which the child does not have"
                )
            if target in sources:
                raise TransferError(
                    f"transfer.rename: {target} would be taken from {sources[target]} and {match.string}"
                )
            sources[target] = match.string
    return sources
