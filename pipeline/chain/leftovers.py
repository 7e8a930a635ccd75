"""Interrupted and abandoned trainings. They are kept until a person deletes them."""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.stage_task import record_in
from pipeline.common.files import free_name
from pipeline.common.folder_lock import held


@dataclass(frozen=True)
class Leftover:
    """The working folder of a training that is not published."""

    folder: Path

    @property
    def title(self) -> str:
        """One line that helps a person to decide."""
        files = [path.stat() for path in self.folder.rglob("*") if path.is_file()]
        record = record_in(self.folder)
        steps = f"{record.trained.steps:,} steps" if record else "damaged"
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(file.st_mtime for file in files)))
        size = sum(file.st_size for file in files) / 1e6
        kept = " (given up with --fresh)" if self._is_abandoned else ""
        return f"{self.folder}: {self.folder.parent.name}: {steps}, saved {saved}, {size:.1f} MB{kept}"

    def delete(self) -> None:
        """Delete the folder. Raises FolderInUse if a run uses the chain's folder."""
        chain, stage, folder = self.folder.parents[2], self.folder.parent.name, self.folder
        with held(chain):
            if not self._is_abandoned:
                # One rename decides: a run could resume from the states that an interruption leaves here.
                folder = free_name(chain / "abandoned" / stage / folder.name, folder.rename)
            shutil.rmtree(folder)
            for place in (self.folder, folder):
                with suppress(OSError):  # The folders may hold other trainings.
                    place.parent.rmdir()
                    place.parents[1].rmdir()

    @property
    def _is_abandoned(self) -> bool:
        return self.folder.parents[1].name == "abandoned"


def leftovers(runs: Path) -> Iterator[Leftover]:
    """All interrupted and abandoned trainings in a folder of runs, by chain and stage."""
    for kind in ("training", "abandoned"):
        for folder in sorted(runs.glob(f"*/*/{kind}/*/*")):
            if any(path.is_file() for path in folder.iterdir()):
                yield Leftover(folder)
