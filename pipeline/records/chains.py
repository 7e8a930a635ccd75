"""Reads the chains and stages of a folder of runs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline.common.contracts import read_contract
from pipeline.common.errors import UserError
from pipeline.common.files import FileError
from pipeline.common.tables import shortest
from pipeline.records.record import FILE, StageRecord

CHAIN_FILE = "chain.json"
Place = Literal["published", "training", "superseded", "abandoned"]
_PLACES: dict[Place, str] = {
    "published": f"*/{FILE}",
    "training": f"training/*/*/{FILE}",
    "superseded": f"superseded/*/{FILE}",
    "abandoned": f"abandoned/*/*/{FILE}",
}
"""Where the records of a chain lie, relative to its folder."""


class RecordsError(UserError):
    """A folder of runs has no records, or not those that were asked for."""


@dataclass(frozen=True)
class ChainFacts:
    """Contents of `chain.json` in the chain's folder."""

    key: str
    """Names the chain; MLflow's run of the chain is found by it."""
    recipe: str
    lmbda: float
    """λ of all stages."""
    seed: int
    """Seed of the root."""


@dataclass(frozen=True)
class StoredStage:
    """A stage's record, and the folder in which it lies."""

    folder: Path
    place: Place
    record: StageRecord

    @property
    def settled(self) -> int | None:
        """Number of lines of `metrics.jsonl` that no resume will cut; None for all."""
        return self.record.trained.lines if self.record.status == "training" else None


@dataclass(frozen=True)
class ChainRecord(ChainFacts):
    """One chain with all stages that were begun, oldest first, rebuilt and abandoned ones included."""

    folder: Path
    stages: tuple[StoredStage, ...]

    @property
    def title(self) -> str:
        """Recipe, λ and seed."""
        return f"{self.recipe}, λ = {shortest(self.lmbda)}, seed {self.seed}"

    @cached_property
    def published(self) -> dict[str, StoredStage]:
        """The published stages, by name, parents before children."""
        found = {stage.record.name: stage for stage in self.stages if stage.place == "published"}
        ordered: dict[str, StoredStage] = {}

        def place(name: str | None) -> None:
            if name in found and name not in ordered:
                place(found[name].record.parent)
                ordered[name] = found[name]

        for name in sorted(found):
            place(name)
        return ordered

    def total_steps(self, name: str) -> int:
        """Training steps of a published stage and all its ancestors."""
        record = self.published[name].record
        return record.steps + (self.total_steps(record.parent) if record.parent in self.published else 0)

    def control(self, name: str) -> str | None:
        """Name of the control of a published stage; None if there is none, or if the stage has the root's codec.

        The control has the root's codec. It was trained for as many steps in all, and on the same training and
        validation images in batches of the same size. So a difference from it is due to the codec.
        """
        records = {name: stage.record for name, stage in self.published.items()}
        plain = [record.codec for record in records.values() if record.parent is None]
        if records[name].codec in plain:
            return None
        wanted = self._conditions(name)
        others = (other for other in records if records[other].codec in plain and self._conditions(other) == wanted)
        return next(others, None)

    def _conditions(self, name: str) -> tuple[object, ...]:
        """What must be equal so that the results of two stages can be compared."""
        record = self.published[name].record
        data = record.settings["data"]
        images = record.train_images.digest, record.lineage.validation
        return self.total_steps(name), *images, data["batch_size"], data["crop"]


def read_chain(folder: Path, damaged: list[str] | None = None) -> ChainRecord:
    """Read a chain's folder. Raises FileError, naming the file, for a damaged record.

    If the list `damaged` is given, the messages about damaged records are added to it instead, and the records left
    out.
    """
    facts = read_contract(ChainFacts, folder / CHAIN_FILE)
    stages = []
    for place, pattern in _PLACES.items():
        for path in sorted(folder.glob(pattern)):
            try:
                stages.append(StoredStage(path.parent, place, StageRecord.read(path.parent)))
            except FileError as error:
                if damaged is None:
                    raise
                damaged.append(str(error))
    in_order = tuple(sorted(stages, key=lambda stage: stage.record.began))
    return ChainRecord(**vars(facts), folder=folder, stages=in_order)


def read_chains(runs: Path) -> list[ChainRecord]:
    """The chains with stages, newest first. Raises RecordsError if there is none, FileError for a damaged record."""
    chains = [chain for path in sorted(runs.glob(f"*/*/{CHAIN_FILE}")) if (chain := read_chain(path.parent)).stages]
    if not chains:
        raise RecordsError(f"{runs}: nothing was run here yet; choose a folder with --runs")
    return sorted(chains, key=lambda chain: chain.stages[0].record.began, reverse=True)
