"""Interrupted and abandoned trainings. They are kept until a person deletes them."""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.files import free_name
from pipeline.common.folder_lock import held
from pipeline.weights.checkpoints import CheckpointError, read_metadata


@dataclass(frozen=True)
class Leftover:
    """The training states of one stage with one set of inputs."""

    chain: Path
    """The chain's folder."""
    folder: Path
    stage: str
    steps: int | None
    """Steps of the newest state; None if it cannot be read."""
    saved: float
    """Time of the newest state, in seconds since 1970."""
    bytes: int

    @property
    def title(self) -> str:
        """One line that helps a person to decide."""
        steps = "damaged" if self.steps is None else f"{self.steps:,} steps"
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved))
        kept = " (given up with --fresh)" if self.folder.parents[1].name == "abandoned" else ""
        return f"{self.folder}: {self.stage}: {steps}, saved {saved}, {self.bytes / 1e6:.1f} MB{kept}"

    def delete(self) -> None:
        """Delete the states. Raises FolderInUse if a run uses the chain's folder."""
        with held(self.chain):
            folder = self.folder
            if folder.parents[1].name == "states":
                # One rename decides: a run could resume from the states that an interruption leaves here.
                folder = free_name(self.chain / "abandoned" / self.stage / folder.name, folder.rename)
            shutil.rmtree(folder)
            for place in (self.folder, folder):
                with suppress(OSError):  # The folders may hold other states.
                    place.parent.rmdir()
                    place.parents[1].rmdir()


def leftovers(runs: Path) -> Iterator[Leftover]:
    """All interrupted and abandoned trainings in a folder of runs, by chain and stage."""
    for kind in ("states", "abandoned"):
        for folder in sorted(runs.glob(f"*/*/{kind}/*/*")):
            states = sorted(folder.glob("segment-*.safetensors"))
            if states:
                bytes_ = sum(path.stat().st_size for path in states)
                chain, stage = folder.parents[2], folder.parent.name
                yield Leftover(chain, folder, stage, _steps(states[-1]), states[-1].stat().st_mtime, bytes_)


def _steps(state: Path) -> int | None:
    try:
        return int(read_metadata(state)["progress"]["stage_step"])
    except (CheckpointError, LookupError, TypeError, ValueError):
        return None
