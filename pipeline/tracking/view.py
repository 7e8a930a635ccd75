"""What MLflow shows of a chain and of its stages, computed from their records alone."""

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking.multimedia import compress_image_size
from PIL import Image

from modules.context.components import SLOTS
from pipeline.common.files import readable
from pipeline.common.tables import shortest
from pipeline.data.pictures import read_image
from pipeline.records import metrics
from pipeline.records.chains import ChainRecord, StoredStage
from pipeline.records.record import FILE, DataSet, Source, StageRecord
from pipeline.weights.published import Quality

LONGEST = 6000
"""Characters of a parameter's value; MLflow refuses longer ones."""
_NAME = re.compile(r"[\w.: /-]+")


@dataclass(frozen=True)
class Artifact:
    """A file among a run's artifacts. `make` writes it to the path that it is given, if the store lacks it."""

    path: PurePosixPath
    make: Callable[[Path], object]
    digest: str | None = None
    """Of a file that changes: a tag then says which content the store has."""

    @property
    def tag(self) -> str:
        """Tag with the digest of the content in the store."""
        return f"hpcm.digest.{self.path}"


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
    artifacts: tuple[Artifact, ...] = field(default=())


def stage_view(chain: ChainRecord, stage: StoredStage, running: bool, first: Mapping[str, int]) -> RunView:
    """The run of a stage. `running` says whether a process works on the chain.

    `first` has the number of lines of each file of metrics that need not be looked at, by name. Raises FileError for
    damaged metrics.
    """
    record = stage.record
    settled = record.trained.lines if record.status == "training" else None
    published = record.status == "done" and record.digest is not None
    artifacts = tuple(_artifacts(stage)) if published else ()
    tags = {
        **_source_tags(record.attempts[-1].source if record.attempts else None),
        **_chain_tags(record.recipe, record.lmbda, record.seed),
        **_stage_tags(stage, chain.folder.parents[1]),
    }
    if published:
        listed = [{"path": "images.json", "type": "table"}]
        tags |= {"mlflow.loggedArtifacts": json.dumps(listed), "mlflow.loggedImages": "True"}
    return RunView(
        key=record.key,
        name=f"{record.recipe} {record.name}",
        parent=chain.facts.key,
        status=_status(record, running),
        began=record.began,
        ended=record.ended,
        parameters=dict(_flat({**record.settings, "codec": record.codec})),
        tags=tags,
        data=((record.train_images, "training"), (record.val_images, "validation")),
        points=tuple(_points(stage.folder, first, settled)),
        artifacts=artifacts,
    )


def chain_view(chain: ChainRecord, running: bool) -> RunView:
    """The run of a chain, with the results of all published stages."""
    records = {name: stage.record for name, stage in chain.published.items()}
    last = max((stage.record for stage in chain.stages), key=lambda record: record.attempts[-1].began)
    tags = {**_source_tags(last.attempts[-1].source), **_chain_tags(chain.recipe, chain.lmbda, chain.seed)}
    artifacts = []
    points = []
    if records:
        table = _table(
            ["stage", "coded bpp", "PSNR dB", "MS-SSIM", "R-D loss", "parameters", "kMAC/pixel", "steps", "training s"],
            [_row(name, record) for name, record in records.items()],
        )
        digest = hashlib.sha256(table.encode()).hexdigest()
        artifacts = [Artifact(PurePosixPath("stages.json"), partial(_write, table), digest)]
        tags["mlflow.loggedArtifacts"] = json.dumps([{"path": "stages.json", "type": "table"}])
        tags["mlflow.note.content"] = _chain_note(chain, records)
    for name, record in records.items():
        # A rebuilt stage has another value, so its step is the number of times that it was superseded.
        step = sum(other.place == "superseded" and other.record.name == name for other in chain.stages)
        if record.quality is not None:
            for key, value in record.quality.metrics(name).items():
                points.append(Metric(key, value, record.ended or 0, step))
    name = f"{chain.recipe} λ={shortest(chain.lmbda)}" + (f" seed {chain.seed}" if chain.seed else "")
    parameters = dict(_flat({"recipe": chain.recipe, "lmbda": chain.lmbda, "seed": chain.seed}))
    status, began = _status(last, running), min(stage.record.began for stage in chain.stages)
    return RunView(
        chain.facts.key, name, None, status, began, last.ended, parameters, tags, (), tuple(points), tuple(artifacts)
    )


def _status(record: StageRecord, running: bool) -> str:
    last = record.attempts[-1].state if record.attempts else "running"
    states = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    return states.get(last, "RUNNING" if running else "KILLED")


def _points(folder: Path, first: Mapping[str, int], settled: int | None) -> Iterator[Metric]:
    for report in metrics.read_reports(folder / metrics.FILE, first.get(metrics.FILE, 0), settled):
        for key, value in report.values.items():
            yield Metric(key, value, report.time, report.step)
    for report in metrics.read_reports(folder / metrics.SYSTEM, first.get(metrics.SYSTEM, 0)):
        for key, value in report.values.items():
            yield Metric(key, value, report.time, report.step)


def _artifacts(stage: StoredStage) -> Iterator[Artifact]:
    record = stage.record
    for name in [*record.files, FILE]:
        if name != metrics.SYSTEM:
            yield Artifact(PurePosixPath(name), partial(shutil.copyfile, stage.folder / name))
    assert record.result is not None
    columns = ["image", "coded bpp", "estimated bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s"]
    rows = [
        [
            image.name, image.quality.bpp, image.estimated_bpp, image.quality.psnr_db, image.quality.ms_ssim,
            image.encode_seconds, image.decode_seconds,
        ]
        for image in record.result.evaluation.images
    ]  # fmt: skip
    yield Artifact(PurePosixPath("images.json"), partial(_write, _table(columns, rows)))
    for name in sorted(record.files):
        path = PurePosixPath(name)
        if path.parts[0] == "reconstructions":
            yield from _picture(stage, path)


def _picture(stage: StoredStage, path: PurePosixPath) -> Iterator[Artifact]:
    """A picture as `MlflowClient.log_image` stores it, under a name that depends only on the record."""
    record, key = stage.record, f"reconstructions/{_safe(path.stem)}"
    name = uuid.uuid5(uuid.NAMESPACE_URL, f"{record.key}/{key}")
    start = f"images/{key.replace('/', '~')}+step+{record.trained.steps}+timestamp+{record.ended}+{name}"
    file = stage.folder / path
    yield Artifact(PurePosixPath(f"{start}.png"), partial(shutil.copyfile, file))
    yield Artifact(PurePosixPath(f"{start}+compressed.webp"), partial(_compress, file))


def _compress(file: Path, target: Path) -> None:
    compress_image_size(Image.fromarray(read_image(file))).save(target)


def _stage_tags(stage: StoredStage, runs: Path) -> dict[str, str]:
    record, start = stage.record, stage.record.start
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(start.tensors.items()))
    known: dict[str, Any] = {
        "hpcm.stage": record.name,
        "hpcm.ledger": counts or None,
        "hpcm.step0_loss": start.step0.rd_loss if start.step0 else None,
        "hpcm.acceptance": "; ".join([record.result.verdict, *record.result.reasons]) if record.result else None,
        "hpcm.checkpoint": readable(str((stage.folder / "checkpoint.safetensors").relative_to(runs)))
        if record.digest
        else None,
        "hpcm.checkpoint_digest": record.digest,
        "mlflow.note.content": _note(record),
    }
    known |= {f"hpcm.input.{name.replace(' ', '_')}": digest for name, digest in record.lineage.inputs.items()}
    for attempt in record.attempts:
        began = f"{datetime.fromtimestamp(attempt.began / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        reason = f"; {attempt.reason}" if attempt.reason else ""
        known[f"hpcm.attempt.{attempt.began}"] = f"{began}: {attempt.how}{reason}"
    return {name: str(value) for name, value in known.items() if value is not None}


def _chain_tags(recipe: str, lmbda: float, seed: int) -> dict[str, str]:
    return {"hpcm.recipe": recipe, "hpcm.lmbda": repr(lmbda), "hpcm.seed": str(seed)}


def _source_tags(source: Source | None) -> dict[str, str]:
    """MLflow's own tags of a run's source, and the versions of the software."""
    if source is None:
        return {}
    # MLflow's pages show only what follows the last slash of a source's name.
    words = takewhile(lambda word: not word.startswith("-") and "/" not in word, source.command.split())
    tags = {"mlflow.source.name": " ".join(words), "mlflow.source.type": "LOCAL", "mlflow.user": source.user}
    tags |= {"hpcm.command": source.command, "hpcm.device": source.device}
    if source.commit:
        tags |= {"mlflow.source.git.commit": source.commit, "hpcm.source_changed": str(source.changed).lower()}
    return tags | {f"hpcm.version.{name}": version for name, version in source.versions.items()}


def _note(record: StageRecord) -> str:
    """The description of a stage's run: what it changes, and what it achieved."""
    begin = f" It begins from `{record.parent}`." if record.parent else ""
    changed = _changes(record.parent_codec, record.codec)
    note = f"Stage `{record.name}` at λ = {record.lmbda:g}.{begin} {changed}"
    return f"{note}\n\n{_results(record)}" if record.status == "done" else note


def _changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """What a stage changes in its parent's codec, in sentences."""
    if before is None:
        return "Root of the chain."
    replaced = [
        f"`{slot}` ({before[slot]['kind']} to {after[slot]['kind']})"
        for slot in SLOTS
        if before[slot]["kind"] != after[slot]["kind"]
    ]
    kept = [name for name in after if name not in SLOTS or before[name]["kind"] == after[name]["kind"]]
    resized = [f"`{name}`" for name in kept if before[name] != after[name]]
    sentences = [f"Replaces {_listed(replaced)}."] if replaced else []
    sentences += [f"Changes the settings of {_listed(resized)}."] if resized else []
    return " ".join(sentences) or "Keeps the parent's codec and trains it further."


def _results(record: StageRecord) -> str:
    """What a stage achieved, in sentences: its sizes, its quality and, if it has a parent, the difference."""
    assert record.result is not None
    result, quality, parent = record.result, record.result.quality, record.result.parent
    size = f"{result.parameters / 1e6:.2f} M parameters, {result.kmacs_per_pixel:.1f} kMAC per pixel"
    values = f"{quality.bpp:.4f} bits per pixel, {quality.psnr_db:.2f} dB PSNR, R-D loss {quality.rd_loss:.4f}"
    lines = [f"{record.trained.steps:,} training steps. {size}."]
    lines.append(f"Real bitstreams of the validation images: {values}.")
    if parent is not None:
        lines.append(f"Relative to the parent: {_relative(quality, parent)}.")
    return " ".join(lines)  # One paragraph: MLflow's page folds a description after a few lines.


def _relative(quality: Quality, parent: Quality) -> str:
    return (
        f"{quality.bpp / parent.bpp - 1:+z.2%} bits, {quality.psnr_db - parent.psnr_db:+z.2f} dB, "
        f"{quality.rd_loss - parent.rd_loss:+z.4f} R-D loss"
    )


def _chain_note(chain: ChainRecord, records: Mapping[str, StageRecord]) -> str:
    """A chain's stages with their results."""
    head = f"Chain of the recipe `{chain.recipe}` at λ = {chain.lmbda:g}. "
    lines = [f"{head}Published stages, measured with real bitstreams:", ""]
    lines += ["| stage | coded bpp | PSNR dB | R-D loss |", "|---|---|---|---|"]
    for name, record in records.items():
        if (quality := record.quality) is not None:
            lines.append(f"| {name} | {quality.bpp:.4f} | {quality.psnr_db:.2f} | {quality.rd_loss:.4f} |")
    return "\n".join(lines)


def _row(name: str, record: StageRecord) -> list[Any]:
    assert record.result is not None
    result, quality = record.result, record.result.quality
    return [
        name, quality.bpp, quality.psnr_db, quality.ms_ssim, quality.rd_loss, result.parameters,
        result.kmacs_per_pixel, record.trained.steps, record.trained.seconds,
    ]  # fmt: skip


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as `MlflowClient.log_table` stores it, rounded to four decimals, since MLflow's page shows all digits."""
    # JSON has no infinity, but the PSNR of an exact reconstruction is infinite.
    cells = [[(round(x, 4) if math.isfinite(x) else None) if isinstance(x, float) else x for x in row] for row in rows]
    return json.dumps({"columns": list(columns), "data": cells})


def _write(text: str, path: Path) -> None:
    path.write_text(text)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted names; items of a list of mappings are named by their `name`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and all(map(_NAME.fullmatch, value)):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from _flat(item, f"{prefix}{key}.{item.get('name', index)}.")
        else:
            yield f"{prefix}{key}", str(value)[:LONGEST]


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _safe(name: str) -> str:
    """The name, with `_` for each character that MLflow does not allow in a picture's key."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in name)
