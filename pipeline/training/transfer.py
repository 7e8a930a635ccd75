"""Transfer of weights from parent to child, with a ledger that puts every tensor into one class."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modules import HPCM
from modules.context.components import Component
from modules.loading import codec_tensors, tensor_digest
from pipeline.common.contracts import read_contract
from pipeline.common.files import write_json
from pipeline.recipes.schema import Transfer
from pipeline.recipes.yaml_source import Misfit, nearest

LEDGER = "ledger.json"
"""The ledger's file in a stage's folder."""
Origin = Literal["copied", "renamed", "narrowed", "fitted", "initialized", "dropped"]


class TransferError(Misfit):
    """A tensor's shapes disagree, or a rename rule does not apply. The message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the child (in the parent, if dropped), its name in the parent, its digest after transfer.

    `new` is true for tensors that a frozen segment trains: those not copied, and all tensors of new components.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: Origin
    new: bool
    digest: str


@dataclass(frozen=True)
class Ledger:
    """All tensors of parent and child; each appears once."""

    entries: tuple[Entry, ...]

    @property
    def new(self) -> frozenset[str]:
        """Names of the child's tensors that a frozen segment trains."""
        return frozenset(entry.name for entry in self.entries if entry.new)

    def counts(self) -> dict[str, int]:
        """Number of tensors per origin."""
        return dict(Counter(entry.kind for entry in self.entries))

    def write(self, folder: Path) -> None:
        """Write the ledger to a stage's folder. Raises FileError."""
        write_json(folder / LEDGER, [asdict(entry) for entry in self.entries])

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """Read the ledger in a stage's folder. Raises FileError, naming the file, if it is missing or damaged."""
        return cls(read_contract(tuple[Entry, ...], folder / LEDGER))


@dataclass(frozen=True)
class Migration:
    """A child and its parent (None for a root stage)."""

    child: HPCM
    parent: HPCM | None
    new: frozenset[str]
    """Names of the tensors that a frozen segment trains."""

    @cached_property
    def components(self) -> list[str]:
        """Components of the child that differ from the parent's."""
        return new_components(self.parent, self.child) if self.parent else []


def transfer_weights(parent: HPCM, child: HPCM, rules: Transfer) -> Ledger:
    """Fill `child` from `parent` in place and return the ledger.

    Tensors of the same name and shape are copied, except in new components, which differ from the parent's. A new
    component takes over the tensors that its kind names (`Kind.takes_over`). `rules.rename` adds more. All other
    tensors keep their initialization. New components start as the identity if `rules.initialization` is
    `function-preserving`. With `scratch` nothing is copied. Raises TransferError if a rule matches nothing or shapes
    disagree.
    """
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    sources = tensors_to_copy(parent, child, rules)
    if rules.initialization == "function-preserving":
        for name in new_components(parent, child):
            component = child.get_submodule(name)
            if isinstance(component, Component):
                component.start_as_identity()
    with torch.no_grad():
        for name, source in sources.items():
            ours[name].copy_(theirs[source])
    return ledger_of(parent, child, sources, {})


def ledger_of(
    parent: HPCM | None, child: HPCM, sources: Mapping[str, str], solved: Mapping[str, tuple[Origin, str | None]]
) -> Ledger:
    """The ledger of a filled child; of a root, all tensors are initialized.

    `sources` maps the child's name to the parent's name for every copied tensor. `solved` maps the child's name to
    (class, source) for every narrowed or fitted tensor.
    """
    ours, theirs = codec_tensors(child), codec_tensors(parent) if parent else {}
    new = new_tensors(parent, child, sources) if parent else frozenset(ours)
    entries = []
    for name, tensor in ours.items():
        source = sources.get(name)
        copied: Origin = "initialized" if source is None else "copied" if source == name else "renamed"
        kind, source = solved.get(name, (copied, source))
        entries.append(Entry(name, source, tuple(tensor.shape), kind, name in new, tensor_digest(tensor)))
    for name in theirs.keys() - {entry.source for entry in entries}:
        entries.append(Entry(name, name, tuple(theirs[name].shape), "dropped", False, tensor_digest(theirs[name])))
    return Ledger(tuple(sorted(entries, key=lambda entry: entry.name)))


def tensors_to_copy(parent: HPCM, child: HPCM, rules: Transfer) -> dict[str, str]:
    """Child's name → parent's name of every transferred tensor. Raises TransferError as `transfer_weights` does."""
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    renamed = _renamed(rules.rename, theirs, ours)
    wanted = {**corresponding(parent, child), **renamed}
    if rules.initialization == "scratch":
        return {}
    different = tuple(f"{name}." for name in new_components(parent, child))
    narrowable = () if parent.config.transform_hidden_rate == child.config.transform_hidden_rate else ("g_a.", "g_s.")
    sources = {}
    for name, source in wanted.items():
        if ours[name].shape == theirs[source].shape:
            sources[name] = source
        elif name in renamed or not name.startswith((*different, *narrowable)):
            raise TransferError(
                f"{name} has shape {list(ours[name].shape)} in the child but {list(theirs[source].shape)} "
                f"as {source} in the parent: they must agree; change the stage's `model` or `transfer.rename`",
                "model",
            )
    return sources


def corresponding(parent: HPCM, child: HPCM) -> dict[str, str]:
    """Child's name → parent's name of corresponding tensors, whatever their shapes.

    In new components, the child's kind says which tensors correspond. Elsewhere they have the same name.
    """
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    different = new_components(parent, child)
    prefixes = tuple(f"{name}." for name in different)
    pairs = {name: name for name in ours if name in theirs and not name.startswith(prefixes)}
    for component in different:
        predecessor, successor = parent.components()[component], child.components()[component]
        for old, new in successor.takes_over(predecessor).items():
            old, new = (f"{component}.{prefix}".rstrip(".") for prefix in (old, new))
            for source, target in _moved(old, new, theirs, rest=r"(?:\..+)?"):
                if target in ours:
                    pairs[target] = source
    return pairs


def new_tensors(parent: HPCM, child: HPCM, sources: Mapping[str, str]) -> frozenset[str]:
    """The child's tensors that a frozen segment trains: those not copied, and all tensors of new components."""
    components = tuple(f"{component}." for component in new_components(parent, child))
    return frozenset(name for name in codec_tensors(child) if sources.get(name) != name or name.startswith(components))


def new_components(parent: HPCM, child: HPCM) -> list[str]:
    """Names of the child's components whose kind or settings differ from the parent's."""
    theirs = parent.components()
    return [name for name, kind in child.components().items() if theirs.get(name) != kind]


def _renamed(rules: Mapping[str, str], theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, str]:
    """Child name → parent name, for every tensor under a renamed prefix."""
    sources: dict[str, str] = {}
    for old, new in rules.items():
        moves = list(_moved(old, new, theirs, rest=r"\.[^.]+"))
        if not moves:
            known = dict.fromkeys(".".join(name.split(".")[:depth]) for name in theirs for depth in (1, 2, 3, 4))
            raise TransferError(
                f"matches no tensor of the parent{nearest(old, list(known))}", "transfer", "rename", old
            )
        for source, target in moves:
            if target not in ours:
                problem = f"renames {source} to {target}, which the child does not have{nearest(target, list(ours))}"
                raise TransferError(problem, "transfer", "rename", old)
            if target in sources:
                raise TransferError(f"both {sources[target]} and {source} become {target}", "transfer", "rename", old)
            sources[target] = source
    return sources


def _moved(old: str, new: str, names: Iterable[str], rest: str) -> Iterable[tuple[str, str]]:
    """(name, new name) of every name that begins with the pattern `old`; `rest` is a regex for the remainder."""
    pattern = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^.]+)", re.escape(old)) + f"(?P<_rest>{rest})")
    for name in names:
        if match := pattern.fullmatch(name):
            yield name, new.format(**match.groupdict()) + match["_rest"]
