"""A stage's settings, folders, parent and input digests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline.common.files import FileError, file_digest
from pipeline.data.images import Photos, find_images
from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import YamlNode
from pipeline.records.record import CHECKPOINT, FILE, StageRecord
from pipeline.weights.metadata import check_file, inputs_digest, read_digest

CODE_VERSION = "1"
"""Increased when the same recipe gives different weights, beyond rounding. Stages built before are then stale."""


@dataclass(frozen=True)
class StageTask:
    """One stage: its settings, its folder and the parent's checkpoint (None for a root).

    A root may be imported from a file (`imported`), or its training may start from a file's weights (`start`).
    """

    stage: Stage
    folder: Path
    """The folder of the published stage, in the chain's folder."""
    parent: Path | None
    imported: Path | None = None
    start: Path | None = None
    find: Callable[[Path | None, Literal["train", "val"], int], Photos] = find_images
    """Finds the images. The stages of a chain share one function with a cache, since folders can be large and slow."""
    source: YamlNode | None = None
    """The stage's YAML, for messages."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Digests of the source of the recipe's plugins, by name."""

    @property
    def chain_folder(self) -> Path:
        """The folder of the chain."""
        return self.folder.parent

    @property
    def checkpoint(self) -> Path:
        """The published checkpoint."""
        return self.folder / CHECKPOINT

    @property
    def is_published(self) -> bool:
        """Whether a published stage is in the folder, current or not."""
        return (self.folder / FILE).is_file() and self.checkpoint.is_file()

    @property
    def trainings(self) -> Path:
        """The folder of the stage's trainings, each in a folder that is named after its inputs."""
        return self.chain_folder / "training" / self.stage.name

    def working(self, inputs: dict[str, str]) -> Path:
        """The folder in which the stage is trained from these inputs. Publication renames it to `folder`."""
        return self.trainings / inputs_digest(inputs)

    def superseded(self, inputs: dict[str, str]) -> Path | None:
        """The folder of an earlier published stage with these inputs, not damaged; None if there is none."""
        for path in sorted((self.chain_folder / "superseded").glob(f"{self.stage.name}-*/{CHECKPOINT}")):
            folder, record = path.parent, record_in(path.parent)
            known = record and (record.name, record.lineage.inputs) == (self.stage.name, inputs)
            if record and known and record.fits_checkpoint(folder):
                return folder
        return None

    @cached_property
    def train_photos(self) -> Photos:
        """Training images. Raises DataError."""
        data = self.stage.data
        return self.find(Path(data.train) if data.train else None, "train", data.crop)

    @cached_property
    def val_photos(self) -> Photos:
        """Validation images. Raises DataError."""
        data = self.stage.data
        return self.find(Path(data.val) if data.val else None, "val", 1)

    def inputs(self) -> dict[str, str]:
        """Digests of all inputs of the result, by name. The parent must be published."""
        if self.imported is not None:
            return {"baseline": self._file_digest, "model": self.stage.model.model_dump_json()}
        images = self.train_photos.digest
        found = {"recipe": self.stage.digest(), "training images": images, "code version": CODE_VERSION}
        found |= {f"plugin {name}": digest for name, digest in self.plugins.items()}
        if self.start is not None:
            found["start"] = self._file_digest
        if self.parent is not None:
            found["parent"] = read_digest(self.parent)
        if self.stage.keep == "best":  # The validation loss selects the weights.
            found["validation images"] = self.val_photos.digest
        return found

    @cached_property
    def _file_digest(self) -> str:
        """SHA-256 of the file `imported` or `start`, hexadecimal."""
        path = self.imported or self.start
        assert path is not None
        check_file(path)
        return file_digest(path)


def record_in(folder: Path) -> StageRecord | None:
    """The record of a stage in a folder; None if there is none or it is damaged."""
    try:
        return StageRecord.read(folder)
    except FileError:
        return None
