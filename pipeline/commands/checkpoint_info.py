"""The codecs that users name: their files, what `hpcm info` prints about them, and which codec made a file."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modules.saved_codec import PUBLISHED, WEIGHTS, check_digest
from pipeline.commands.lazy import imported_when_called
from pipeline.common import packaged
from pipeline.common.errors import raised_as
from pipeline.common.tables import Table
from pipeline.evaluation.conversions import SUFFIX
from pipeline.records.record import FILE as RECORD
from pipeline.records.record import StageRecord
from pipeline.weights.metadata import CheckpointError, is_official, read_metadata
from pipeline.weights.published import Lineage
from pipeline.weights.shipped import codec_file
from pipeline.weights.trained_for import stage_settings, with_loss

CODEC_FORMS = (
    "A codec is a stage's folder or checkpoint, a folder of `save_pretrained` or its file, a `.pth.tar`, "
    "`models:/NAME@ALIAS` in MLflow, a name on the Hugging Face Hub, or the name of a bundled codec."
)
registered_file = imported_when_called("pipeline.tracking.mlflow_model:registered_file")
load_codec = imported_when_called("pipeline.weights.checkpoints:load_codec")


def codec_path(text: str) -> Path:
    """The file of a codec, which a user may name in any form; MLflow's is downloaded. Raises CheckpointError."""
    return registered_file(text) if text.startswith("models:/") else codec_file(text)


Codec = Annotated[Path | None, typer.Option(parser=codec_path, metavar="CODEC")]
"""An option that names a codec."""


def is_codec(path: Path) -> bool:
    """Whether a command's argument names a codec, rather than a coded file or a folder of them."""
    if path.is_dir():
        return any((path / name).is_file() for name in (PUBLISHED, WEIGHTS))
    return path.suffix == ".safetensors" or is_official(path) or not (path.exists() or path.suffix == SUFFIX)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a codec's file says about itself."""

    path: Path
    metadata: dict[str, Any]
    known: Lineage
    """The lineage in the metadata, with λ and metric if the file's name tells them."""
    ancestry: tuple[str, ...]
    """The stage and its ancestors, root first. Ancestors whose folder is not beside the stage's are missing."""

    @classmethod
    def read(cls, file: Path) -> "CheckpointInfo":
        """Read a codec's file. Compare its weights with the digest in it, and with that in the record beside it.

        Raises CheckpointError, and FileError for a damaged record.
        """
        if is_official(file):
            model = load_codec(file)
            metadata = {**model.lineage, "config": model.config.to_dict()}
        else:
            metadata = read_metadata(file)
            with raised_as(CheckpointError):
                check_digest(file, metadata.get("digest"))
            recorded = file.name == PUBLISHED and file.with_name(RECORD).exists()
            if recorded and StageRecord.read(file.parent).digest != metadata["digest"]:
                raise CheckpointError(f"{file}: not the checkpoint that was recorded in {file.with_name(RECORD)}")
        if not isinstance(metadata.get("config"), dict):
            raise CheckpointError(f"{file}: this is a training state, not a published checkpoint")
        return cls(file, metadata, with_loss(Lineage.of(metadata, file), file.name), _ancestry(file, metadata))

    def to_json(self) -> dict[str, Any]:
        """All values, as `hpcm info --json` prints them."""
        known, stage = self.known, stage_settings(self.known.stage)
        preset, phase = self._model.get("preset"), self._model.get("phase")
        return {
            "file": str(self.path),
            "stage": known.name,
            "preset": preset if isinstance(preset, str) else None,
            "phase": phase if isinstance(phase, int) else None,
            "lmbda": known.lmbda,
            "metric": known.metric,
            "parent": stage["parent"] if isinstance(stage.get("parent"), str) else None,
            "lineage": list(self.ancestry),
            "inputs": known.inputs,
            "quality": asdict(known.quality) if known.quality else None,
            "config": self.metadata["config"],
            "model": known.identity,
            "digest": self.metadata["digest"],
            "imported_from": known.imported_from,
            "exported_from": known.exported_from,
            "filled_with_ones": known.filled_with_ones,
        }

    def table(self) -> Table:
        """The values that are known, as `hpcm info` prints them."""
        values, quality = self.to_json(), self.known.quality
        source = [
            f"imported from {values['imported_from']}" if values["imported_from"] else "",
            f"exported from {values['exported_from'][:12]}" if values["exported_from"] else "",
            f"{values['filled_with_ones']} set to ones" if values["filled_with_ones"] else "",
        ]
        rows = {
            "stage": values["stage"],
            "codec": self._codec(),
            "λ": f"{values['lmbda']:g} ({values['metric']})" if values["lmbda"] else None,
            "rates": ", ".join(f"{rate:g}" for rate in values["config"].get("rates", ())),
            "parent": values["parent"],
            "quality": f"{quality.text('coded bpp')}, loss {quality.rd_loss:.4f}" if quality else None,
            "lineage": " → ".join(self.ancestry),
            "source": ", ".join(filter(None, source)),
            "model": values["model"],
            "digest": values["digest"],
        }
        table = Table(str(self.path), ("", ""), left=2)
        for name, value in rows.items():
            if value:
                table.add(name, value)
        return table

    @property
    def _model(self) -> dict[str, Any]:
        """The stage's choice of a codec."""
        model = stage_settings(self.known.stage).get("model")
        return model if isinstance(model, dict) else {}

    def _codec(self) -> str:
        """Preset and phase of a stage's codec; sizes and components of any other."""
        config, preset, phase = self.metadata["config"], self._model.get("preset"), self._model.get("phase")
        if isinstance(preset, str) and isinstance(phase, int):
            own = ["with settings of its own"] if self._model.get("overrides") else []
            return ", ".join([preset, f"Phase {phase}" if phase else "Baseline", *own])
        kinds = [str(slot["kind"]) for slot in config.values() if isinstance(slot, dict) and "kind" in slot]
        return f"M = {config.get('M')}, N = {config.get('N')}, {', '.join(dict.fromkeys(kinds))}"


def _ancestry(file: Path, metadata: dict[str, Any]) -> tuple[str, ...]:
    beside = {found["digest"]: found for _, found in _published(file.parent.parent.glob(f"*/{PUBLISHED}"))}
    line = [metadata]
    while parent := beside.pop(line[-1].get("inputs", {}).get("parent"), None):
        line.append(parent)
    return tuple(f"{found.get('name', '?')} {found['digest'][:12]}" for found in reversed(line))


def _published(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in paths:
        try:
            metadata = read_metadata(path)
        except CheckpointError:
            continue
        yield path, metadata


def known_codecs(runs: Path) -> dict[str, Path]:
    """The files of the codecs that decode coded files, by the codec's identity (hexadecimal).

    Covers the bundled weights and the stages published in a folder of runs. Checkpoints that do not record their
    identity are left out.
    """
    paths = (*runs.glob(f"*/*/*/{PUBLISHED}"), *packaged.WEIGHTS.glob("*.safetensors"))
    return {metadata["identity"]: path for path, metadata in _published(paths) if "identity" in metadata}


def name_of(path: Path) -> str:
    """The name of a known codec's file in messages."""
    return f"bundled {path.name}" if path.parent == packaged.WEIGHTS else str(path)
