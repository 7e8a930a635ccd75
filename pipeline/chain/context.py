"""What the stages of a chain share while it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.chain.request import Rebuild
from pipeline.common.processes import ProcessGroup
from pipeline.training.watcher import Watcher

Beside = Callable[[Path], AbstractContextManager[object]]
"""Makes a context that works on a folder beside the run, such as a thread that mirrors it to MLflow."""


def nothing(folder: Path) -> AbstractContextManager[object]:
    """Do nothing beside the run."""
    return nullcontext()


@dataclass(frozen=True)
class RunContext:
    """Processes, watcher and options of a run."""

    processes: ProcessGroup
    watcher: Watcher = field(default_factory=Watcher)
    accept_anyway: bool = False
    rebuild: Rebuild = field(default_factory=Rebuild)
    mirror: Beside = nothing
    """Works beside the run on the chain's folder, in the first process."""
    sample: Beside = nothing
    """Works beside the training on the stage's folder, in the first process."""
