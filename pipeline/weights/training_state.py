"""The training states of a stage. A step draws its randomness from (seed, step), so they store no generator."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from pipeline.common.contracts import contract_of
from pipeline.weights import checkpoints
from pipeline.weights.metadata import CheckpointError

STATES = "segment-*.safetensors"
"""Pattern of the names of training states."""
PARTS = ("model", "optimizer", "average", "best")
"""The first part of a tensor's name in a state, before a slash."""
STATES_KEPT = 2
"""Number of newest training states to keep; the second serves if the newest is damaged."""


@dataclass(frozen=True)
class Progress:
    """The segment (index into the schedule), steps done in it and in the stage, and running statistics."""

    segment: int = 0
    step: int = 0
    stage_step: int = 0
    bad_steps: int = 0
    """Steps of the stage that were skipped because of a non-finite loss or gradient."""
    consecutive_bad: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """The segment's last finite losses. A loss far above their median counts as exploded."""
    exploded_steps: int = 0
    """Steps of the stage with an exploded loss."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last log line, and their `count`, so that a resumed run logs the same values."""
    lines: int = 0
    """Lines of the stage's metrics that precede this state. A resume cuts the others."""
    best_loss: float | None = None
    """The segment's lowest validation loss, if it keeps the best weights; None before its first validation."""
    best_step: int = 0
    """Step of the segment at which the lowest loss was measured."""

    def next_segment(self) -> "Progress":
        """The start of the next segment."""
        return replace(self, segment=self.segment + 1, step=0, window={}, losses=[], best_loss=None, best_step=0)


@dataclass(frozen=True)
class TrainingState:
    """A saved state of a stage's training: tensors on the CPU or a GPU, by name."""

    progress: Progress
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """`<state>/<parameter name>` → tensor; empty at the start of a segment."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the segment's trainable parameters; empty without `ema`."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The segment's trainable parameters at the lowest validation loss; empty without `keep: best`."""


class StateFolder:
    """The training states in a stage's working folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, state: TrainingState) -> None:
        """Save a state, then delete all but the two newest. Raises FileError."""
        tensors = {f"{part}/{name}": t for part in PARTS for name, t in getattr(state, part).items()}
        name = f"segment-{state.progress.segment:02d}-step-{state.progress.stage_step:08d}.safetensors"
        checkpoints.write(self.folder / name, tensors, {"progress": asdict(state.progress)})
        self._delete(self._newest_first()[STATES_KEPT:])

    def newest(self) -> tuple[TrainingState | None, list[str]]:
        """The newest readable state or None, and an error message for each newer file that is unreadable."""
        passed_over = []
        for path in self._newest_first():
            try:
                checkpoint = checkpoints.read(path)
                progress = contract_of(Progress, checkpoint.metadata.get("progress"), path, CheckpointError)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
            for key, tensor in checkpoint.tensors.items():
                part, _, name = key.partition("/")
                if part in parts:
                    parts[part][name] = tensor
            return TrainingState(progress, **parts), passed_over
        return None, passed_over

    def forget(self) -> None:
        """Delete the states of a stage that is published. Other files stay."""
        self._delete(self._newest_first())

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(STATES), reverse=True)

    def _delete(self, states: list[Path]) -> None:
        """Delete states, and what a killed process left of unfinished files."""
        for path in [*states, *self.folder.glob("*.partial")]:
            path.unlink()
