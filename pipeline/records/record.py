"""The record of a stage: `record.json` in its folder. All other places, such as MLflow's pages, are views of it.

The record is written whole at each milestone: when the stage begins and resumes, with each saved state, after each
segment, and with its result. A folder of runs can be moved and copied; the record contains no path that depends on it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.common.contracts import read_contract
from pipeline.common.files import FileError, file_digest, write_json
from pipeline.data.images import Photos
from pipeline.evaluation.results import Evaluation
from pipeline.weights.metadata import seal
from pipeline.weights.published import Lineage, Quality

FILE = "record.json"
CHECKPOINT = "checkpoint.safetensors"
VERSION = 1
Status = Literal["training", "refused", "done"]


@dataclass(frozen=True)
class DataSet:
    """A set of images: its name, its origin, its digest, and its size."""

    name: str
    source: str
    digest: str
    images: int
    pixels: int

    @classmethod
    def of(cls, photos: Photos) -> "DataSet":
        """The facts about images that were found."""
        return cls(photos.name, photos.source, photos.digest, len(photos.paths), photos.pixels)


@dataclass(frozen=True)
class Source:
    """The origin of an attempt: command, user, commit, device and versions of the software."""

    command: str
    user: str
    commit: str
    """Commit of this program's source; empty outside a repository."""
    changed: bool
    """Whether the source differs from the commit."""
    device: str
    versions: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What affects rounding in a step: device, threads, processes, … A change between attempts is reported."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at the stage, from its start to its end or interruption. Times are in ms since 1970."""

    began: int
    how: str
    """`started`, or `resumed in <segment> at step <n>`."""
    source: Source
    state: Literal["running", "finished", "interrupted", "failed"] = "running"
    """`running` also if the attempt was killed."""
    ended: int | None = None
    """None while the attempt runs, and if it was killed."""
    reason: str = ""
    """The first line of the error that ended it."""


@dataclass(frozen=True)
class SegmentResult:
    """What a finished segment gave. `quality` is estimated on the validation images; `seconds` are its steps alone."""

    name: str
    steps: int
    seconds: float
    quality: Quality


@dataclass(frozen=True)
class Start:
    """The transfer, and estimates on the validation images before the first step."""

    tensors: Mapping[str, int] = field(default_factory=dict)
    """How many tensors were copied, renamed, initialized, dropped, …"""
    parent: Quality | None = None
    step0: Quality | None = None
    """The child before its first step."""
    step0_gap: float | None = None
    """R-D loss of the child minus that of its parent."""


@dataclass(frozen=True)
class Trained:
    """How far the training has come, as of the last saved state."""

    steps: int = 0
    skipped_steps: int = 0
    """Steps without an update, because a loss or gradient was not finite."""
    exploded_steps: int = 0
    seconds: float = 0.0
    """Time of all steps, without interruptions."""
    lines: int = 0
    """Lines of `metrics.jsonl` that no resume will cut."""


@dataclass(frozen=True)
class RateResult:
    """What a codec of several rates gives at one λ: the mean over the validation images, with the loss of that λ."""

    lmbda: float
    quality: Quality


@dataclass(frozen=True)
class Result:
    """The evaluation of the trained codec with real bitstreams, and the verdict on it."""

    evaluation: Evaluation
    parent: Quality | None
    """Quality of the parent on the same images."""
    verdict: str
    """`accepted`, `accepted anyway` or `refused`."""
    reasons: tuple[str, ...]
    """The limits that the result exceeds."""
    parameters: int
    kmacs_per_pixel: float
    rates: tuple[RateResult, ...] = ()
    """Empty for a codec of one rate."""

    @property
    def quality(self) -> Quality:
        """The mean over all images."""
        return self.evaluation.quality


@dataclass(frozen=True)
class StageRecord:
    """Everything that is known about one stage."""

    key: str
    """Names this training among all others; MLflow's run is found by it. A rebuilt stage has another key."""
    recipe: str
    lmbda: float
    seed: int
    """The chain's seed, which is that of its root."""
    name: str
    parent: str | None
    """Name of the parent stage; None for a root."""
    status: Status
    lineage: Lineage
    """The part that the checkpoint carries too. It has the quality once the stage is evaluated."""
    codec: Mapping[str, Any]
    """The codec's configuration, as `HPCMConfig.to_dict` gives it."""
    parent_codec: Mapping[str, Any] | None
    train_images: DataSet
    val_images: DataSet
    attempts: tuple[Attempt, ...] = ()
    start: Start = Start()
    trained: Trained = Trained()
    segments: tuple[SegmentResult, ...] = ()
    """The finished segments, in order."""
    result: Result | None = None
    digest: str | None = None
    """Digest of the published weights."""
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of every published file except this one, by its path in the folder."""
    version: int = VERSION

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved stage with all defaults, as a recipe's YAML gives it."""
        return dict(yaml.safe_load(self.lineage.stage or "{}"))

    @property
    def imported(self) -> bool:
        """Whether the weights come from a file, without training."""
        return "baseline" in self.lineage.inputs

    @property
    def quality(self) -> Quality | None:
        """Quality with real bitstreams on the validation images; None before the evaluation."""
        return self.result.quality if self.result else None

    @property
    def evaluated(self) -> Result:
        """The result, which every published stage has."""
        assert self.result is not None
        return self.result

    @property
    def schedule(self) -> list[dict[str, Any]]:
        """The segments of the recipe; none for an imported stage."""
        return [] if self.imported else list(self.settings["schedule"])

    @property
    def steps(self) -> int:
        """Training steps of the whole schedule."""
        return sum(segment["steps"] for segment in self.schedule)

    @property
    def began(self) -> int:
        """When the first attempt began, in ms since 1970."""
        return self.attempts[0].began if self.attempts else 0

    @property
    def ended(self) -> int | None:
        """When the last attempt ended, in ms since 1970; None while it runs, or if it was killed."""
        return self.attempts[-1].ended if self.attempts else None

    def fits_checkpoint(self, folder: Path) -> bool:
        """Whether the checkpoint in a folder is the published one, byte for byte. Raises FileError if it is missing."""
        return file_digest(folder / CHECKPOINT) == self.files.get(CHECKPOINT)

    @classmethod
    def read(cls, folder: Path) -> "StageRecord":
        """Read a record. Raises FileError if it is missing, damaged, of a later version, or changed since `write`."""
        path = folder / FILE
        record = read_contract(cls, path)
        if record.version > VERSION:
            raise FileError(f"{path}: version {record.version}; this program reads up to {VERSION}: update it")
        fields = json.loads(path.read_bytes())
        if fields.pop("seal", None) != seal(fields):
            raise FileError(f"{path}: damaged: it was changed after it was written")
        return record

    def write(self, folder: Path) -> None:
        """Write the record atomically, with a digest of its fields. Raises FileError."""
        fields = asdict(self)
        write_json(folder / FILE, {**fields, "seal": seal(fields)})
