"""What the stages of a chain share while it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.common.processes import ProcessGroup
from pipeline.training.reporting import Watcher

Beside = Callable[[Path], AbstractContextManager[object]]
"""Makes a context that works on a folder beside the run, such as a thread that mirrors it to MLflow."""


@dataclass(frozen=True)
class RunContext:
    """Processes, watcher and options of a run."""

    processes: ProcessGroup
    watcher: Watcher = field(default_factory=Watcher)
    accept_anyway: bool = False
    force: bool = False
    """Rebuild the chain's last stage even if it is current."""
    fresh: bool = False
    """Restart interrupted trainings from step 0."""
    confirm: Callable[[list[str]], None] = lambda consequences: None
    """Raises an error that stops the run if the person does not agree to the consequences."""
    mirror: Beside = nullcontext
    """Works beside the run on the chain's folder, in the first process."""
    sample: Beside = nullcontext
    """Works beside the training on the stage's folder, in the first process."""
