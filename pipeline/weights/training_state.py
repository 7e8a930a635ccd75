"""Saves and restores the training states of a stage.

All randomness of a step is drawn from (seed, step), so a state stores no random number generator.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.contracts import contract_of
from pipeline.weights.metadata import CheckpointError, inputs_digest, read_metadata

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

    def next_segment(self) -> Progress:
        """The start of the next segment."""
        return replace(self, segment=self.segment + 1, step=0, window={}, losses=[], best_loss=None, best_step=0)


@dataclass(frozen=True)
class TrainingState:
    """A saved state of a stage's training."""

    progress: Progress
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """`<state>/<parameter name>` → tensor; empty at the start of a segment."""
    facts: dict[str, Any]
    """Measured before the first step: ledger and step-0 comparison."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of the segment's trainable parameters, by name; empty without `ema`."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The segment's trainable parameters at the lowest validation loss, by name; empty without `keep: best`."""


class StateFolder:
    """The training states of a stage for one set of inputs; `inputs` holds their digests."""

    def __init__(self, root: Path, inputs: dict[str, str]):
        self.root, self.inputs = root, inputs
        self.folder = root / inputs_digest(inputs)

    def save(self, state: TrainingState) -> None:
        """Save a state, then delete all but the two newest."""
        from pipeline.weights import checkpoints

        tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in state.optimizer.items()}
        tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in state.best.items()}
        metadata = {"progress": vars(state.progress), "facts": state.facts, "inputs": self.inputs}
        name = f"segment-{state.progress.segment:02d}-step-{state.progress.stage_step:08d}.safetensors"
        checkpoints.write(self.folder / name, tensors, metadata)
        for path in [*self._files()[STATES_KEPT:], *self.folder.glob("*.partial")]:
            path.unlink()

    def newest(self) -> tuple[TrainingState | None, list[str]]:
        """The newest readable state or None, and an error message for each newer file that is unreadable."""
        from pipeline.weights import checkpoints

        passed_over = []
        for path in self._files():
            try:
                checkpoint = checkpoints.read(path)
                progress = contract_of(Progress, checkpoint.metadata.get("progress"), path, CheckpointError)
            except CheckpointError as error:
                passed_over.append(str(error))
                continue
            parts = {part: _under(checkpoint.tensors, part) for part in ("model", "optimizer", "average", "best")}
            return TrainingState(progress, **parts, facts=checkpoint.metadata["facts"]), passed_over
        return None, passed_over

    def progress(self) -> Progress | None:
        """Progress of the newest state with readable metadata; None if there is none. The tensors are not read."""
        for path in self._files():
            with suppress(CheckpointError):
                return contract_of(Progress, read_metadata(path).get("progress"), path, CheckpointError)
        return None

    def forget(self) -> None:
        """Delete the states, when the stage is about to be published. Other files stay."""
        for path in [*self._files(), *self.folder.glob("*.partial")]:
            path.unlink()

    def other_inputs(self) -> dict[str, str] | None:
        """Inputs of an unfinished training of the stage that differ from these, or None."""
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
    """An optimizer's state by parameter name. Its groups must have `names` as well as `params`."""
    return {
        f"{key}/{name}": value.clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore tensors of `optimizer_tensors` on the parameters' devices; fused Adam needs its `step` there too."""
    import torch

    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = {key.removesuffix(f"/{name}"): t for key, t in tensors.items() if key.partition("/")[2] == name}
            if state:
                optimizer.state[parameter] = {
                    key: torch.empty_like(t if t.dim() == 0 else parameter, device=parameter.device).copy_(t)
                    for key, t in state.items()
                }
