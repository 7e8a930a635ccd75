"""A stage's settings, folders, parent and input digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.common import files
from pipeline.common.files import FileError
from pipeline.data.images import Photos, check_folder, find_images
from pipeline.recipes.loading import RecipeError
from pipeline.recipes.schema import ModelChoice, Stage
from pipeline.recipes.yaml_source import Misfit, YamlNode, dotted
from pipeline.records.record import CHECKPOINT, StageRecord
from pipeline.records.record import FILE as RECORD
from pipeline.weights.metadata import check_file, read_digest
from pipeline.weights.training_state import Progress, StateFolder

if TYPE_CHECKING:
    import torch

    from modules.config import HPCMConfig

CODE_VERSION = "1"
"""Increased when the same recipe gives different weights, beyond rounding. Stages built before are then stale."""


@dataclass(frozen=True)
class StageTask:
    """One stage: its settings, its folder and the parent's checkpoint (None for a root).

    A root may be imported from a file (`imported`), or its training may start from a file's weights (`start`).
    """

    stage: Stage
    folder: Path
    parent: Path | None
    imported: Path | None = None
    start: Path | None = None
    find: Callable[[Path | None, Literal["train", "val"], int], Photos] = find_images
    """Finds the images. The stages of a chain share one function with a cache, since folders can be large and slow."""
    source: YamlNode | None = None
    """The stage's YAML, for messages."""

    @property
    def checkpoint(self) -> Path:
        """The published checkpoint."""
        return self.folder / CHECKPOINT

    @property
    def runs(self) -> Path:
        """The folder of runs, which contains the chain's folder."""
        return self.folder.parents[2]

    @property
    def is_published(self) -> bool:
        """Whether the stage has a record and a checkpoint in its place."""
        return (self.folder / RECORD).is_file() and self.checkpoint.is_file()

    @staticmethod
    def record_of(folder: Path) -> StageRecord | None:
        """The record in a published or working folder; None if it is missing or damaged."""
        try:
            return StageRecord.read(folder)
        except FileError:
            return None

    @cached_property
    def config(self) -> HPCMConfig:
        """The codec's configuration. Raises RecipeError for invalid settings."""
        from modules.config import preset_config

        choice = self.stage.model
        try:
            return preset_config(choice.preset, choice.phase, **choice.overrides)
        except ValueError as error:
            raise RecipeError(self.located(_misfit(choice, str(error)))) from error

    def located(self, misfit: Misfit, *prefix: str | int) -> str:
        """A message that names the file and line of a value that does not fit, or the stage if they are not known."""
        path = (*prefix, *misfit.path)
        where = self.source.origin_of(path) if self.source else self.stage.name
        return f"{where}: {dotted(path)}: {misfit.problem}"

    def check_folders(self) -> None:
        """Raise DataError if a folder of images is missing or has none. The images are not read."""
        for folder, split in ((self.stage.data.train, "train"), (self.stage.data.val, "val")):
            if folder:
                check_folder(Path(folder), split)

    @property
    def states(self) -> StateFolder:
        """The working folder of the training with the present inputs. The parent must be published."""
        return StateFolder(self._trainings, self.inputs())

    @property
    def _trainings(self) -> Path:
        # Not in the stage's own folder, which is replaced as a whole.
        return self.folder.parent / "training" / self.stage.name

    @property
    def is_begun(self) -> bool:
        """Whether an unfinished training of the stage exists, with any inputs."""
        return any(self._trainings.glob("*/*"))

    def abandon(self) -> None:
        """Move all unfinished trainings of the stage to `abandoned/`, in one rename."""
        files.free_name(self.folder.parent / "abandoned" / self.stage.name, self._trainings.rename)

    def position(self, progress: Progress) -> str:
        """Where a training stands, such as `frozen at step 300`."""
        names = [*(segment.name for segment in self.stage.schedule), "evaluation"]
        return f"{names[progress.segment]} at step {progress.step}"

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
        if self.start is not None:
            found["start"] = self._file_digest
        if self.parent is not None:
            found["parent"] = read_digest(self.parent)
        if self.stage.keep == "best":  # The validation loss selects the weights.
            found["validation images"] = self.val_photos.digest
        return found

    def kernel(self, device: torch.device) -> str:
        """The implementation of the Bi-WKV4 operator on a device; empty for a codec without it."""
        if not any(kind.name == "rwkv" for kind in self.config.components.values()):
            return ""
        from modules.biwkv4.build import cpu_kernels, cuda_kernels

        kernels = cuda_kernels() if device.type == "cuda" else cpu_kernels()
        return "compiled" if kernels else "PyTorch reference"

    def facts(self, device: torch.device) -> dict[str, str]:
        """What all processes must agree on before they train together, as short strings by name."""
        import torch

        settings = self.stage.model_dump_json(exclude={"data": {"train", "val"}})  # Paths may differ; images may not.
        found = {name: digest[:16] for name, digest in self.inputs().items()}
        found |= {"validation images": self.val_photos.digest[:16], "settings": files.text_digest(settings)[:16]}
        return {**found, "PyTorch": torch.__version__, "device": device.type, "Bi-WKV4": self.kernel(device)}

    @cached_property
    def _file_digest(self) -> str:
        """SHA-256 of the file `imported` or `start`, hexadecimal."""
        path = self.imported or self.start
        assert path is not None
        check_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _misfit(model: ModelChoice, problem: str) -> Misfit:
    """The problem of a codec's configuration, with the key that it names."""
    from modules.config import PRESETS

    if model.preset not in PRESETS:
        return Misfit(problem, "model", "preset")
    named = [key for key in model.overrides if re.search(rf"\b{re.escape(key)}\b", problem)]
    path = ("overrides", named[0]) if named else ()
    return Misfit(problem.removeprefix(f"{named[0]}: ") if named else problem, "model", *path)
