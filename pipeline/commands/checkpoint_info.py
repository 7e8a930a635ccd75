"""What `hpcm info` prints about a checkpoint, and the names of the codecs that made coded files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.common.packaged import WEIGHTS
from pipeline.common.tables import Table
from pipeline.weights.metadata import CheckpointError, is_official, read_metadata

FILE = "checkpoint.safetensors"


def checkpoint_file(path: Path) -> Path:
    """The checkpoint file at a path, which may be the file itself or its stage's folder."""
    return path / FILE if (path / FILE).is_file() else path


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint or a stage's folder that contains one."""
    return path.suffix == ".safetensors" or is_official(path) or (path / FILE).is_file()


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's metadata and lineage."""

    path: Path
    metadata: dict[str, Any]
    lineage: tuple[str, ...]
    """The stage and its ancestors, root first. Ancestors whose folder is not beside the stage's are missing."""

    @classmethod
    def read(cls, path: Path) -> "CheckpointInfo":
        """Read a published checkpoint; raises CheckpointError."""
        file = checkpoint_file(path)
        metadata = read_metadata(file)
        if "config" not in metadata:
            raise CheckpointError(f"{file}: this is a training state, not a published checkpoint")
        return cls(file, metadata, _lineage(file, metadata))

    def to_json(self) -> dict[str, Any]:
        """All values, as `hpcm info --json` prints them."""
        stage = self._stage
        return {
            "file": str(self.path),
            "stage": self.metadata.get("name"),
            "preset": stage.get("model", {}).get("preset"),
            "phase": stage.get("model", {}).get("phase"),
            "lmbda": stage.get("lmbda"),
            "metric": stage.get("metric"),
            "parent": stage.get("parent"),
            "lineage": list(self.lineage),
            "inputs": self.metadata.get("inputs", {}),
            "quality": self.metadata.get("quality"),
            "config": self.metadata["config"],
            "model": self.metadata.get("identity"),
            "digest": self.metadata["digest"],
            "imported_from": self.metadata.get("imported_from"),
            "exported_from": self.metadata.get("exported_from"),
            "filled_with_ones": self.metadata.get("filled_with_ones"),
        }

    def table(self) -> Table:
        """The values that are known, as `hpcm info` prints them."""
        values, quality = self.to_json(), self.metadata.get("quality")
        source = [
            f"imported from {values['imported_from']}" if values["imported_from"] else "",
            f"exported from {values['exported_from'][:12]}" if values["exported_from"] else "",
            f"{values['filled_with_ones']} set to ones" if values["filled_with_ones"] else "",
        ]
        rows = {
            "stage": values["stage"],
            "codec": _codec(self._stage["model"]) if values["preset"] else None,
            "λ": f"{values['lmbda']:g} ({values['metric']})" if values["lmbda"] else None,
            "parent": values["parent"],
            "quality": _quality(quality) if quality else None,
            "lineage": " → ".join(self.lineage),
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
    def _stage(self) -> dict[str, Any]:
        return yaml.safe_load(self.metadata.get("stage", "")) or {}


def _codec(model: dict[str, Any]) -> str:
    phase = f"Phase {model['phase']}" if model["phase"] else "Baseline"
    return ", ".join([model["preset"], phase, *(["with settings of its own"] if model["overrides"] else [])])


def _quality(quality: dict[str, Any]) -> str:
    similarity = f", MS-SSIM {quality['ms_ssim']:.4f}" if quality["ms_ssim"] is not None else ""
    return f"{quality['bpp']:.4f} coded bpp, {quality['psnr_db']:.2f} dB{similarity}, loss {quality['rd_loss']:.4f}"


def _lineage(file: Path, metadata: dict[str, Any]) -> tuple[str, ...]:
    beside = {found["digest"]: found for _, found in _published(file.parent.parent.glob(f"*/{FILE}"))}
    line = [metadata]
    while parent := beside.get(line[-1].get("inputs", {}).get("parent")):
        line.append(parent)
    return tuple(f"{found.get('name', '?')} {found['digest'][:12]}" for found in reversed(line))


def _published(paths: Iterator[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(paths):
        try:
            metadata = read_metadata(path)
        except CheckpointError:
            continue
        yield path, metadata


def known_models(runs: Path) -> dict[str, str]:
    """Names of the checkpoints that decode coded files, by the model's identity (hexadecimal).

    Covers the bundled weights and the stages published in a folder of runs. Checkpoints that do not record their
    identity are left out.
    """
    published = {m["identity"]: str(path) for path, m in _published(runs.glob(f"*/*/*/{FILE}")) if "identity" in m}
    bundled = _published(WEIGHTS.glob("*.safetensors"))
    return published | {metadata["identity"]: f"bundled {path.name}" for path, metadata in bundled}
