"""What MLflow shows of a chain and of its stages, computed from their records alone."""

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from pipeline.common.files import FileError, readable
from pipeline.common.tables import shortest
from pipeline.data.pictures import read_image
from pipeline.records import metrics
from pipeline.records.chains import ChainRecord, StoredStage
from pipeline.records.record import CHECKPOINT, FILE, DataSet, StageRecord
from pipeline.tracking.descriptions import chain_description, images_table, stage_description, stages_table

LONGEST = 5000
"""Characters of a parameter or tag; MLflow cuts longer ones."""
_SMALL = ".webp"
"""Ending of the small copies of pictures."""


@dataclass(frozen=True)
class Artifact:
    """A file among a run's artifacts: a text, or the content of a file of the stage."""

    path: str
    text: str | None = None
    file: Path = Path()

    @property
    def derived(self) -> bool:
        """Whether another version of a library may write other bytes."""
        return self.path.endswith(_SMALL)

    def write(self, target: Path) -> None:
        """Write the content to a file. Raises FileError if the stage's file is missing."""
        if self.text is not None:
            target.write_text(self.text)
        elif not self.file.is_file():
            raise FileError(f"{self.file}: no such file")
        elif self.derived:
            compress_image_size(Image.fromarray(read_image(self.file))).save(target)
        else:
            shutil.copyfile(self.file, target)


@dataclass(frozen=True)
class RunView:
    """A run as MLflow should show it. Times are in ms since 1970."""

    key: str
    name: str
    parent: str | None
    """Key of the run that contains it."""
    status: str
    began: int
    ended: int | None
    parameters: dict[str, str]
    tags: dict[str, str]
    data: tuple[tuple[DataSet, str], ...] = ()
    """Sets of images with their use, `training` or `validation`."""
    points: tuple[Metric, ...] = ()
    latest: tuple[Metric, ...] = ()
    """Metrics of which only the present value is known, and no step."""
    artifacts: tuple[Artifact, ...] = ()


def stage_view(chain: ChainRecord, stage: StoredStage, working: bool, seen: Mapping[str, int]) -> RunView:
    """The run of a stage. `working` says whether a process works on the chain.

    `seen` has the number of lines of each file of metrics that need not be looked at. Raises FileError for damaged
    metrics.
    """
    record = stage.record
    status, ended = _end(chain, stage, working)
    tags = {**_tags(chain, record), "hpcm.stage": record.name, "mlflow.note.content": stage_description(record)}
    tags |= {f"hpcm.input.{name.replace(' ', '_')}": digest for name, digest in record.lineage.inputs.items()}
    if counts := record.start.tensors:
        tags["hpcm.ledger"] = ", ".join(f"{count} {origin}" for origin, count in sorted(counts.items()))
    if record.start.step0:
        tags["hpcm.step0_loss"] = str(record.start.step0.rd_loss)
    if record.result:
        tags["hpcm.acceptance"] = "; ".join([record.result.verdict, *record.result.reasons])
        tags |= {"mlflow.loggedArtifacts": _tables("images.json"), "mlflow.loggedImages": "True"}
    if record.digest:
        checkpoint = (stage.folder / CHECKPOINT).relative_to(chain.folder.parents[1])
        tags |= {"hpcm.checkpoint": readable(str(checkpoint)), "hpcm.checkpoint_digest": record.digest}
    for attempt in record.attempts:
        began = f"{datetime.fromtimestamp(attempt.began / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        tags[f"hpcm.attempt.{attempt.began}"] = "; ".join(filter(None, [f"{began}: {attempt.how}", attempt.reason]))
    return RunView(
        key=record.key,
        name=f"{record.recipe} {record.name}",
        parent=chain.key,
        status=status,
        began=record.began,
        ended=ended,
        parameters=dict(_flat({**record.settings, "codec": record.codec})),
        tags={name: _text(value) for name, value in tags.items()},
        data=((record.train_images, "training"), (record.val_images, "validation")),
        points=tuple(_points(stage, seen)),
        artifacts=tuple(_artifacts(stage)),
    )


def chain_view(chain: ChainRecord, working: bool) -> RunView:
    """The run of a chain, with the results of all published stages."""
    last, published = _last(chain), [stage.record for stage in chain.published.values()]
    status, ended = _end(chain, last, working)
    tags = _tags(chain, last.record)
    if published:
        tags["mlflow.loggedArtifacts"] = _tables("stages.json")
        tags["mlflow.note.content"] = chain_description(chain.recipe, chain.lmbda, published)
    return RunView(
        key=chain.key,
        name=f"{chain.recipe} λ={shortest(chain.lmbda)}" + (f" seed {chain.seed}" if chain.seed else ""),
        parent=None,
        status=status,
        began=min(stage.record.began for stage in chain.stages),
        ended=ended,
        parameters={"recipe": _text(chain.recipe), "lmbda": str(chain.lmbda), "seed": str(chain.seed)},
        tags={name: _text(value) for name, value in tags.items()},
        latest=tuple(_results(published)),
        artifacts=(Artifact("stages.json", stages_table(published)),) if published else (),
    )


def _results(published: Sequence[StageRecord]) -> Iterator[Metric]:
    """The results of all stages by name, and those of the newest as the chain's own."""
    newest = max(published, key=lambda record: record.ended or 0, default=None)
    for record, prefix in [*((record, record.name) for record in published), *([(newest, "final")] if newest else [])]:
        for key, value in record.evaluated.quality.metrics(prefix).items():
            yield Metric(key, value, record.ended or record.began, 0)


def _last(chain: ChainRecord) -> StoredStage:
    return max(chain.stages, key=lambda stage: stage.record.attempts[-1].began if stage.record.attempts else 0)


def _end(chain: ChainRecord, stage: StoredStage, working: bool) -> tuple[str, int | None]:
    """Status and end of a run. An attempt without an end was killed, unless a process works on it."""
    record = stage.record
    last = record.attempts[-1].state if record.attempts else "running"
    if last != "running":
        return {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[last], record.ended
    if working and stage == _last(chain):
        return "RUNNING", None
    times = [report.time for report in metrics.read_reports(stage.folder / metrics.FILE)]
    return "KILLED", max(times, default=record.began)


def _points(stage: StoredStage, seen: Mapping[str, int]) -> Iterator[Metric]:
    for name, last in ((metrics.FILE, stage.settled), (metrics.SYSTEM, None)):
        for report in metrics.read_reports(stage.folder / name, seen.get(name, 0), last):
            for key, value in report.values.items():
                # MLflow refuses a name with other characters.
                yield Metric(re.sub(r"[^\w.: /-]", "_", key), value, report.time, report.step)


def _artifacts(stage: StoredStage) -> Iterator[Artifact]:
    record, pictures = stage.record, []
    if record.result is not None:
        pictures = sorted((stage.folder / "reconstructions").glob("*.png"))
        yield Artifact("images.json", images_table(record))
    if record.status != "training":
        yield Artifact(FILE, (stage.folder / FILE).read_text())
    found = [path for path in (stage.folder / "ledger.json", *pictures) if path.exists()]
    for path in [stage.folder / name for name in record.files] or found:
        yield Artifact(readable(path.relative_to(stage.folder).as_posix()), file=_own(stage, path))
    for path in pictures:
        # Paths as `MlflowClient.log_image` makes them, but always the same for a record. MLflow's page orders its
        # charts by name: `coded` is before `final`.
        key = f"coded~{re.sub(r'[^A-Za-z0-9_. -]', '_', path.stem)}"
        name = f"images/{key}+step+{record.trained.steps}+timestamp+{record.began}"
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{record.key}/{readable(path.stem)}")
        for ending in (".png", f"+compressed{_SMALL}"):
            yield Artifact(f"{name}+{unique}{ending}", file=_own(stage, path))


def _own(stage: StoredStage, path: Path) -> Path:
    """The path, if it lies in the stage's folder; the record and links in the folder may be a stranger's."""
    if not path.resolve().is_relative_to(stage.folder.resolve()):
        raise FileError(f"{path}: it does not lie in the stage's folder, so it is not sent to MLflow")
    return path


def _tags(chain: ChainRecord, record: StageRecord) -> dict[str, str]:
    """Recipe, λ and seed, MLflow's own tags of a run's source, and the versions of the software."""
    tags = {"hpcm.recipe": chain.recipe, "hpcm.lmbda": repr(chain.lmbda), "hpcm.seed": str(chain.seed)}
    if not record.attempts:
        return tags
    source = record.attempts[-1].source
    # MLflow's pages show only what follows the last slash of a source's name.
    words = takewhile(lambda word: not word.startswith("-") and "/" not in word, source.command.split())
    tags |= {"mlflow.source.name": " ".join(words), "mlflow.source.type": "LOCAL", "mlflow.user": source.user}
    tags |= {"hpcm.command": source.command, "hpcm.device": source.device}
    if source.commit:
        tags |= {"mlflow.source.git.commit": source.commit, "hpcm.source_changed": str(source.changed).lower()}
    return tags | {f"hpcm.version.{name}": version for name, version in source.versions.items()}


def _tables(path: str) -> str:
    """The tag that tells MLflow's page which artifact is a table."""
    return json.dumps([{"path": path, "type": "table"}])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted names; items of a list of mappings are named by their `name`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and all(re.fullmatch(r"[\w.: /-]+", name) for name in value):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from _flat(item, f"{prefix}{key}.{item.get('name', index)}.")
        else:
            yield f"{prefix}{key}", _text(str(value))


def _text(value: str) -> str:
    """The value as every store accepts it."""
    return value.encode("utf-8", "replace").decode().replace("\0", "?")[:LONGEST]
