"""A chain of stages behaves like make: what is done stays, what was cut off goes on, what is stale is built anew."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline import checkpoints
from pipeline.checkpoints import CheckpointError
from pipeline.interruption import Interrupted
from pipeline.job import StageJob, Workplace
from pipeline.schema import Stage
from pipeline.stage import StageRun
from pipeline.state import StateFolder
from pipeline.tracking import EndState, Run, Store

Status = Literal["done", "cut off", "stale", "missing"]


class ChainError(Exception):
    """Stages that cannot be run together."""


@dataclass(frozen=True)
class Planned:
    """A stage with where it stands and why."""

    job: StageJob
    status: Status
    reason: str

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.job.stage.name


class Chain:
    """The stages from a root to a target, under runs/<recipe>/lmbda-<λ>[-seed-<s>]/<stage>.

    The seed is the root's: chains of other seeds than 0 lie beside the first one, as those of other λ do. The root
    is taken from the file `baseline`, or trained from the weights in the file `start`, where one is given.
    """

    def __init__(
        self,
        recipe: str,
        stages: Sequence[Stage],
        runs: Path,
        baseline: Path | None = None,
        start: Path | None = None,
    ):
        if len({stage.precision for stage in stages}) > 1:
            raise ChainError("all stages of a chain must have the same precision: it is a property of the processes")
        self.recipe, self.lmbda, self.runs = recipe, stages[-1].lmbda, runs
        self.precision = stages[0].precision
        self.seed = stages[0].seed
        self.folder = runs / recipe / (f"lmbda-{self.lmbda:g}" + (f"-seed-{self.seed}" if self.seed else ""))
        self.jobs = []
        for stage in stages:
            parent = self.folder / stage.parent / "checkpoint.safetensors" if stage.parent else None
            files = (None, None) if stage.parent else (baseline, start)
            self.jobs.append(StageJob(stage, self.folder / stage.name, parent, *files))

    def plan(self) -> list[Planned]:
        """Where every stage stands, root first; raises what reading its inputs raises."""
        planned: list[Planned] = []
        for job in self.jobs:
            before = planned[-1] if planned else None
            planned.append(_stand(job, before))
        return planned

    def run(self, workplace: Workplace) -> None:
        """Run what is missing, cut off or stale; raises what stops a stage, the state being kept."""
        plan = self.plan()
        workplace.wait_for_everyone()
        chain_run = self._open(workplace)
        try:
            for number, planned in enumerate(plan):
                # A stage that waited for its parent can be told only now.
                self._run_stage(_stand(planned.job, None) if number else planned, workplace, chain_run)
        except BaseException as error:
            chain_run.end(_end_state(error))
            raise
        chain_run.end("FINISHED")

    def _run_stage(self, planned: Planned, workplace: Workplace, chain_run: Run) -> None:
        if planned.status == "done":
            workplace.watcher.note(f"{planned.name}: done")
            return
        workplace.watcher.note(f"{planned.name}: {planned.reason}")
        if workplace.is_main and planned.status == "stale":
            _set_aside(planned.job)
        workplace.wait_for_everyone()
        run: Run = Run()
        if workplace.is_main:
            inputs = checkpoints.text_digest(json.dumps(planned.job.inputs(), sort_keys=True))
            key = f"{self._identity()}/{planned.name}/{inputs[:16]}"
            tags = {**self._tags(), "hpcm.stage": planned.name}
            run = Store.default(self.runs).open_run(key, f"{self.recipe} {planned.name}", chain_run, tags)
        try:
            StageRun(planned.job, workplace, run).execute()
        except BaseException as error:
            run.tags({"hpcm.ended_by": f"{type(error).__name__}: {error}"[:500]})
            run.end(_end_state(error))
            raise

    def _open(self, workplace: Workplace) -> Run:
        if not workplace.is_main:
            return Run()
        name = f"{self.recipe} λ={self.lmbda:g}" + (f" seed {self.seed}" if self.seed else "")
        run = Store.default(self.runs).open_run(self._identity(), name, tags=self._tags())
        run.parameters({"recipe": self.recipe, "lmbda": self.lmbda, "stages": [job.stage.name for job in self.jobs]})
        return run

    def _tags(self) -> dict[str, str]:
        return {"hpcm.recipe": self.recipe, "hpcm.lmbda": f"{self.lmbda:g}", "hpcm.seed": str(self.seed)}

    def _identity(self) -> str:
        """What the chain's runs are found by, drawn once for its folder."""
        path = self.folder / "chain.json"
        if not path.exists():
            checkpoints.write_json(path, {"identity": uuid.uuid4().hex})
        return str(json.loads(path.read_text())["identity"])


def _end_state(error: BaseException) -> EndState:
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED"


def _stand(job: StageJob, before: Planned | None) -> Planned:
    """Where a stage stands; `before` is its parent's plan where that has not been run yet."""
    _ = job.config  # settings that no codec has are an error before anything runs
    exists = job.record.is_file() and job.checkpoint.is_file()
    if before is not None and before.status != "done":
        status: Status = "stale" if exists else "missing"
        return Planned(job, status, f"waits for {before.name}")
    inputs = job.inputs()
    if exists:
        changed = _changes(job, inputs)
        if not changed:
            return Planned(job, "done", "current")
        return Planned(job, "stale", f"stale: {changed}")
    state, _passed_over = StateFolder(job.folder / "state", inputs).newest()
    if state is None:
        return Planned(job, "missing", "not built yet")
    phases = [*(phase.name for phase in job.stage.schedule), "evaluation"]
    return Planned(job, "cut off", f"cut off in {phases[state.progress.phase]} at step {state.progress.step}")


def _changes(job: StageJob, inputs: dict[str, str]) -> str:
    """Why a published stage is not current, or an empty string."""
    record: dict[str, Any] = json.loads(job.record.read_text())
    try:
        digest = checkpoints.read_metadata(job.checkpoint)["digest"]
    except CheckpointError as error:
        return str(error)
    if digest != record["digest"]:
        return "the checkpoint is not the one that was recorded"
    known = record["inputs"]
    return ", ".join(
        f"{name} changed" if name in known and name in inputs else f"{name} is {'new' if name in inputs else 'gone'}"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    )


def _set_aside(job: StageJob) -> None:
    """Move what a stale stage published out of the way: nothing that was won is deleted."""
    digest = json.loads(job.record.read_text())["digest"]
    target = job.folder.parent / "superseded" / f"{job.stage.name}-{digest[:12]}"
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while target.exists():
        number += 1
        target = target.with_name(f"{job.stage.name}-{digest[:12]}-{number}")
    job.folder.rename(target)
