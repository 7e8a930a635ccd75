"""What a stage is made from and where: settings, place, parent, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.common import files
from pipeline.data.images import Photos, find_images
from pipeline.recipes.loading import RecipeError
from pipeline.recipes.schema import Stage
from pipeline.training.watcher import Watcher
from pipeline.weights.metadata import check_file, read_digest
from pipeline.weights.training_state import StateFolder

if TYPE_CHECKING:
    import torch

    from modules.config import HPCMConfig
    from pipeline.common.processes import ProcessGroup

CODE_VERSION = "1"
"""Counted up when a recipe gives other weights, by more than rounding: what was built before is then stale."""


@dataclass(frozen=True)
class Rebuild:
    """What a person wants built anew though it need not be, and how to ask whether that is meant."""

    force: bool = False
    """Build the chain's last stage again though it is current."""
    fresh: bool = False
    """Begin again what was cut off in training."""
    confirm: Callable[[list[str]], None] = lambda consequences: None
    """Raises what stops the run where the person does not agree."""


@dataclass(frozen=True)
class RunContext:
    """What all stages of a chain share: where they lie, the processes they run on, who watches."""

    folder: Path
    processes: ProcessGroup
    watcher: Watcher = field(default_factory=Watcher)
    accept_anyway: bool = False
    rebuild: Rebuild = field(default_factory=Rebuild)

    @property
    def runs(self) -> Path:
        """The folder of runs, in which the chain's is."""
        return self.folder.parents[1]

    @property
    def is_main(self) -> bool:
        """Whether this process evaluates, publishes and talks to MLflow."""
        return self.processes.accelerator.is_main_process

    def wait_for_everyone(self) -> None:
        """Let no process run ahead of what another writes."""
        self.processes.accelerator.wait_for_everyone()

    def on_main_process(self, work: Callable[[], None]) -> None:
        """Let the first process do something that all wait for; where it raises, all stop."""
        self.processes.on_main_process(work)


@dataclass(frozen=True)
class StageTask:
    """One stage and its place: settings and the parent's checkpoint (None for a root).

    A root may be taken from a file (`imported`), or be trained from a file's weights instead of random ones (`start`).
    """

    stage: Stage
    folder: Path
    parent: Path | None
    imported: Path | None = None
    start: Path | None = None
    find: Callable[[Path | None, Literal["train", "val"], int], Photos] = find_images
    """Finds the images; the stages of a chain share one that remembers, since folders can be large and far away."""

    @property
    def checkpoint(self) -> Path:
        """What the stage publishes."""
        return self.folder / "checkpoint.safetensors"

    @property
    def record(self) -> Path:
        """What is known of the published stage beyond its checkpoint: times, digests, runs."""
        return self.folder / "record.json"

    @cached_property
    def config(self) -> HPCMConfig:
        """The codec to be built; raises RecipeError for settings that it does not have."""
        from modules.config import preset_config

        choice = self.stage.model
        try:
            return preset_config(choice.preset, choice.phase, **choice.overrides)
        except ValueError as error:
            raise RecipeError(f"{self.stage.name}: model: {error}") from error

    @property
    def states(self) -> StateFolder:
        """Where the stage's training states lie; the parent must be published."""
        return self.states_of(self.inputs())

    def states_of(self, inputs: dict[str, str]) -> StateFolder:
        """Where the states lie of a training from these inputs.

        Not in the stage's own folder: that is moved away as a whole when the stage is built again.
        """
        return StateFolder(self.folder.parent / "states" / self.stage.name, inputs)

    @property
    def is_begun(self) -> bool:
        """Whether a training of the stage, in whatever form, was cut off."""
        return not self.record.is_file() and any((self.folder.parent / "states" / self.stage.name).glob("*/*"))

    def abandon_states(self) -> None:
        """Begin the stage anew: move the training states of every form away, at once."""
        states = self.folder.parent / "states" / self.stage.name
        files.free_name(self.folder.parent / "abandoned" / self.stage.name, states.rename)

    @cached_property
    def train_photos(self) -> Photos:
        """Training images; raises DataError."""
        data = self.stage.data
        return self.find(Path(data.train) if data.train else None, "train", data.crop)

    @cached_property
    def val_photos(self) -> Photos:
        """Validation images; raises DataError."""
        data = self.stage.data
        return self.find(Path(data.val) if data.val else None, "val", 1)

    def inputs(self) -> dict[str, str]:
        """Digests of all that the result is made from, by name; the parent must be published."""
        if self.imported is not None:
            return {"baseline": self._file_digest, "model": repr(self.config)}
        images = self.train_photos.digest
        found = {"recipe": self.stage.digest(), "training images": images, "code version": CODE_VERSION}
        if self.start is not None:
            found["start"] = self._file_digest
        if self.parent is not None:
            found["parent"] = read_digest(self.parent)
        return found

    def kernel(self, device: torch.device) -> str:
        """What computes the Bi-WKV4 operator on a device; empty for a codec that has none."""
        if not any(kind.name == "rwkv" for kind in self.config.components.values()):
            return ""
        from modules.biwkv4_build import cpu_kernels, cuda_kernels

        kernels = cuda_kernels() if device.type == "cuda" else cpu_kernels()
        return "compiled" if kernels else "PyTorch reference"

    def facts(self, device: torch.device) -> dict[str, str]:
        """What all processes must have alike before they train together, each in a few characters."""
        import torch

        settings = self.stage.model_dump_json(exclude={"data": {"train", "val"}})  # Paths may differ; images may not.
        found = {name: digest[:16] for name, digest in self.inputs().items()}
        found |= {"validation images": self.val_photos.digest[:16], "settings": files.text_digest(settings)[:16]}
        return {**found, "PyTorch": torch.__version__, "device": device.type, "Bi-WKV4": self.kernel(device)}

    @cached_property
    def _file_digest(self) -> str:
        """SHA-256 of the file that the root is taken from or starts from."""
        path = self.imported or self.start
        assert path is not None
        check_file(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
