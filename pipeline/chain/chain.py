"""A chain of stages behaves like make: what is done stays, what was cut off goes on, what is stale is built anew."""

import json
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.chain.passed_checks import check_unless_passed
from pipeline.chain.stage_task import RunContext, StageTask
from pipeline.common import files
from pipeline.common.errors import Interrupted, MainProcessStopped, UserError
from pipeline.common.fault_injection import fault
from pipeline.common.files import FileError
from pipeline.common.folder_lock import held
from pipeline.data.images import find_images
from pipeline.recipes.schema import Stage
from pipeline.tracking.outbox import PATIENCE, Outbox
from pipeline.tracking.store import EndState, Run, Store
from pipeline.weights.metadata import CheckpointError, inputs_digest, read_metadata

Status = Literal["done", "cut off", "stale", "missing"]
PATIENCE_INTERRUPTED = 10.0
"""Seconds that a chain waits for MLflow to take what was said to it, when a signal asks it to stop."""


class ChainError(UserError):
    """Stages that cannot be run together, or not so."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with where it stands and why."""

    task: StageTask
    status: Status
    reason: str

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.task.stage.name


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
        self.tasks = []
        find = cache(find_images)
        for stage in stages:
            parent = self.folder / stage.parent / "checkpoint.safetensors" if stage.parent else None
            files = (None, None) if stage.parent else (baseline, start)
            task = StageTask(stage, self.folder / stage.name, parent, *files, find=find)
            for file in filter(None, files):
                if file.absolute() == task.checkpoint.absolute():
                    raise ChainError(f"{file}: this is the chain's own {stage.name}, which need not be given")
            self.tasks.append(task)
        self.outbox: Outbox | None = None

    def plan(self) -> list[PlannedStage]:
        """Where every stage stands, root first; raises what reading its inputs raises."""
        check_unless_passed(self.tasks)
        planned: list[PlannedStage] = []
        for task in self.tasks:
            before = planned[-1] if planned else None
            planned.append(_status_of(task, before))
        return planned

    def run(self, context: RunContext) -> None:
        """Run what is missing, cut off or stale; raises what stops a stage, the state being kept.

        Raises FolderInUse where another process runs a chain in the same folder.
        """
        with context.processes.noticing_lost_processes(), ExitStack() as exits:
            context.on_main_process(lambda: self._enter(context, exits))
            try:
                self._run_stages(context)
            except BaseException as error:
                if self.outbox is not None:
                    self.outbox.close(PATIENCE_INTERRUPTED if _end_state(error) == "KILLED" else PATIENCE)
                raise
            if self.outbox is not None:
                self.outbox.close()
            # All is done, but whoever asked to stop may have more in mind than this chain.
            if signum := context.processes.agreed_signal():
                raise Interrupted(signum)

    def _enter(self, context: RunContext, exits: ExitStack) -> None:
        exits.enter_context(held(self.folder))
        self._start_over(context)
        self.outbox = Outbox(self.folder / "outbox", Store.default(self.runs), context.watcher.note)

    def _run_stages(self, context: RunContext) -> None:
        from pipeline.chain.precheck import check_stages

        check_stages(self.tasks)
        plan = self.plan()
        context.wait_for_everyone()
        chain_run = self._chain_run()
        try:
            for number, planned in enumerate(plan):
                if signum := context.processes.agreed_signal():
                    raise Interrupted(signum)
                # A stage that waited for its parent can be told only now; and by all, before one changes anything.
                now = _status_of(planned.task, None) if number else planned
                context.wait_for_everyone()
                self._run_stage(now, context, chain_run)
        except BaseException as error:
            with suppress(FileError):
                chain_run.end(_end_state(error))
            raise
        chain_run.end("FINISHED")

    def _run_stage(self, planned: PlannedStage, context: RunContext, chain_run: Run) -> None:
        context.watcher.note(f"{planned.name}: {'done' if planned.status == 'done' else planned.reason}")
        if planned.status == "done":
            if context.is_main:
                planned.task.forget_states()  # which a kill after publication left behind
            return
        if planned.status == "stale":
            context.on_main_process(lambda: self._set_aside(planned.task))
        from pipeline.chain.stage import StageRun

        fault("stage")
        run = self._stage_run(planned, chain_run)
        stage_run = StageRun(planned.task, context, run)
        try:
            stage_run.execute()
        except BaseException as error:
            with suppress(FileError):
                stage_run.note_end(error)
                run.end(_end_state(error))
            raise

    def _chain_run(self) -> Run:
        if self.outbox is None:
            return Run()
        name = f"{self.recipe} λ={self.lmbda:g}" + (f" seed {self.seed}" if self.seed else "")
        run = self.outbox.run(self._facts()["identity"], name, tags=self._tags())
        run.parameters({"recipe": self.recipe, "lmbda": self.lmbda, "stages": [task.stage.name for task in self.tasks]})
        return run

    def _stage_run(self, planned: PlannedStage, chain_run: Run) -> Run:
        if self.outbox is None:
            return Run()
        rebuilt = self._facts()["rebuilt"].get(planned.name, 0)
        key = f"{chain_run.key}/{planned.name}/{inputs_digest(planned.task.inputs())}"
        tags = {**self._tags(), "hpcm.stage": planned.name}
        return self.outbox.run(f"{key}/{rebuilt}", f"{self.recipe} {planned.name}", chain_run, tags)

    def _tags(self) -> dict[str, str]:
        return {"hpcm.recipe": self.recipe, "hpcm.lmbda": repr(self.lmbda), "hpcm.seed": str(self.seed)}

    def _facts(self) -> dict[str, Any]:
        """`identity`: what the chain's runs are found by; `rebuilt`: how often each stage began anew."""
        path = self.folder / "chain.json"
        if not path.exists():
            files.write_json(path, {"identity": uuid.uuid4().hex, "rebuilt": {}})
        try:
            facts = json.loads(path.read_text())
            return {"identity": str(facts["identity"]), "rebuilt": dict(facts.get("rebuilt", {}))}
        except (ValueError, TypeError, LookupError) as error:
            raise ChainError(f"{path}: damaged; delete it, and MLflow gets new runs for this chain") from error

    def _begin_anew(self, task: StageTask) -> None:
        """Give the stage a new run in MLflow: the old one keeps what it was told."""
        facts = self._facts()
        rebuilt = {**facts["rebuilt"], task.stage.name: facts["rebuilt"].get(task.stage.name, 0) + 1}
        files.write_json(self.folder / "chain.json", {**facts, "rebuilt": rebuilt})

    def _start_over(self, context: RunContext) -> None:
        """Make way for what a person wants built anew; asks first."""
        wish, target = context.rebuild, self.tasks[-1]
        published = [target] if wish.force and target.record.is_file() else []
        begun = [task for task in self.tasks if wish.fresh and task.is_begun]
        consequences = [
            *(f"{task.stage.name}: what is published moves to {self.folder / 'superseded'}" for task in published),
            *(f"{task.stage.name}: the training that was cut off is deleted" for task in begun),
        ]
        if consequences:
            wish.confirm(consequences)
        for task in begun:
            self._begin_anew(task)
            task.forget_states()
        for task in published:
            self._set_aside(task)

    def _set_aside(self, task: StageTask) -> None:
        """Move what a stage published out of the way: nothing that was won is deleted."""
        self._begin_anew(task)
        digest = _record(task).get("digest", "damaged")
        target = self.folder / "superseded" / f"{task.stage.name}-{digest[:12]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{task.stage.name}-{digest[:12]}-{number}")
        task.folder.rename(target)
        fault("set-aside")


def _end_state(error: BaseException) -> EndState:
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt | MainProcessStopped) else "FAILED"


def _status_of(task: StageTask, before: PlannedStage | None) -> PlannedStage:
    """Where a stage stands; `before` is its parent's plan where that has not been run yet."""
    exists = task.record.is_file() and task.checkpoint.is_file()
    if before is not None and before.status != "done":
        status: Status = "stale" if exists else "missing"
        return PlannedStage(task, status, f"waits for {before.name}")
    inputs = task.inputs()
    if exists:
        _check_source(task)
        changed = _changes(task, inputs)
        if not changed:
            return PlannedStage(task, "done", "current")
        return PlannedStage(task, "stale", f"stale: {changed}")
    progress = task.states.progress()
    if progress is not None:
        names = [*(segment.name for segment in task.stage.schedule), "evaluation"]
        at = f"{names[progress.segment]} at step {progress.step}"
        return PlannedStage(task, "cut off", f"cut off in {at}")
    other = task.states.other_form()
    passed = f"; an interrupted training is left alone: {_differences(other, inputs)}" if other else ""
    return PlannedStage(task, "missing", f"not built yet{passed}")


def _check_source(task: StageTask) -> None:
    """Raise ChainError where a root came from a file and none is given: more likely forgotten than meant."""
    if task.imported or task.start:
        return
    for option, make in (("baseline", " (with make: BASELINE=)"), ("start", "")):
        if option in _record(task).get("inputs", {}):
            raise ChainError(
                f"{task.folder}: made from a file given as --{option}{make}; give it again.\n"
                "  To train this stage from the beginning instead, choose another folder with --runs."
            )


def _record(task: StageTask) -> dict[str, Any]:
    """What was recorded of a published stage; empty where the file is damaged."""
    try:
        record = json.loads(task.record.read_text())
        return record if isinstance(record, dict) else {}
    except (ValueError, OSError):
        return {}


def _changes(task: StageTask, inputs: dict[str, str]) -> str:
    """Why a published stage is not current, or an empty string."""
    record = _record(task)
    if not {"digest", "inputs"} <= record.keys():
        return f"{task.record} is damaged"
    try:
        digest = read_metadata(task.checkpoint)["digest"]
    except CheckpointError as error:
        return str(error)
    if digest != record["digest"]:
        return "the checkpoint is not the one that was recorded"
    return _differences(record["inputs"], inputs)


def _differences(known: dict[str, str], inputs: dict[str, str]) -> str:
    return ", ".join(
        f"{name} changed" if name in known and name in inputs else f"{name} is {'new' if name in inputs else 'gone'}"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    )
