"""Where a stage stands: a value that is saved, found again and continued from.

All randomness of a step is drawn from (seed, step), so weights, optimizer state and two counters are the whole of it.
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.contracts import read_contract
from pipeline.common.files import write_json
from pipeline.weights.metadata import CheckpointError, inputs_digest, read_metadata

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATES_KEPT = 2
"""Training states kept, newest first: the one before the last serves where the last is damaged."""


@dataclass(frozen=True)
class Progress:
    """Segment (index into the schedule), steps done in it and in the whole stage, and what was counted on the way."""

    segment: int = 0
    step: int = 0
    stage_step: int = 0
    bad_steps: int = 0
    """Steps skipped in the stage for a non-finite loss or gradient."""
    consecutive_bad: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """The segment's last finite losses, by whose median an exploding one is told."""
    exploded_steps: int = 0
    """Steps of the stage whose loss was many times that median."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums since the last log line, and their `count`: a resumed run logs what an uninterrupted one does."""

    def next_segment(self) -> Progress:
        """The beginning of the segment after this one."""
        return replace(self, segment=self.segment + 1, step=0, window={}, losses=[])


@dataclass(frozen=True)
class TrainingState:
    """One saved moment of a stage."""

    progress: Progress
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`<state>/<parameter name>` → tensor; empty at the beginning of a segment."""
    facts: dict[str, Any]
    """What the stage found out before its first step: ledger, step-0 comparison."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the segment's trainable parameters, by name; empty without `ema`."""


@dataclass(frozen=True)
class TrainingRun:
    """`run.json`, which lies beside the states."""

    key: str


class StateFolder:
    """The training states of one stage in one form; `inputs` are the digests of what the stage is made from."""

    def __init__(self, root: Path, inputs: dict[str, str]):
        self.root, self.inputs = root, inputs
        self.folder = root / inputs_digest(inputs)

    def save(self, state: TrainingState) -> None:
        """Save a state and let go of those beyond the last two."""
        from pipeline.weights import checkpoints

        tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()}
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
        metadata = {"progress": vars(state.progress), "facts": state.facts, "inputs": self.inputs}
        name = f"segment-{state.progress.segment:02d}-step-{state.progress.stage_step:08d}.safetensors"
        checkpoints.write(self.folder / name, tensors, metadata)
        for path in [*self._files()[STATES_KEPT:], *self.folder.glob("*.partial")]:
            path.unlink()

    def newest(self) -> tuple[TrainingState | None, list[str]]:
        """The newest readable state, and a line for each file that was passed over."""
        from pipeline.weights import checkpoints

        passed_over = []
        for path in self._files():
            try:
                checkpoint = checkpoints.read(path)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            progress = Progress(**checkpoint.metadata["progress"])
            parts = {part: _under(checkpoint.tensors, part) for part in ("model", "optimizer", "average")}
            return TrainingState(progress, **parts, facts=checkpoint.metadata["facts"]), passed_over
        return None, passed_over

    def progress(self) -> Progress | None:
        """How far the newest state got whose file is whole, its tensors unread; None where there is no state."""
        for path in self._files():
            with suppress(CheckpointError):
                return Progress(**read_metadata(path)["progress"])
        return None

    def run_key(self) -> str:
        """What this training's MLflow run is found by: drawn when it begins, and gone with its states."""
        path = self.folder / "run.json"
        if not path.exists():
            write_json(path, asdict(TrainingRun(uuid.uuid4().hex)))
        return read_contract(TrainingRun, path, CheckpointError).key

    def forget(self) -> None:
        """Delete the states: what they led to is published."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # Of other forms and stages there may be more.
            self.root.rmdir()
            self.root.parent.rmdir()

    def other_form(self) -> dict[str, str] | None:
        """Inputs of a training of the stage that was cut off in another form, or None."""
        for path in self.root.glob("*/segment-*.safetensors"):
            if path.parent != self.folder:
                with suppress(CheckpointError):
                    return dict(read_metadata(path)["inputs"])
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("segment-*.safetensors"), reverse=True)


def _under(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by parameter name; its groups must list `names` beside `params`."""
    return {
        f"{key}/{name}": value.clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, on the parameters' devices: there the fused Adam wants its `step` too."""
    import torch

    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.removesuffix(f"/{name}"): t for key, t in tensors.items() if key.partition("/")[2] == name}
            if state:
                optimizer.state[parameter] = {
                    key: torch.empty_like(t if t.dim() == 0 else parameter, device=parameter.device).copy_(t)
                    for key, t in state.items()
                }
