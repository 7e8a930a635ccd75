"""A chain of stages. Like make, it skips finished stages, resumes interrupted ones and rebuilds stale ones."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.chain.acceptance import refusal_reasons
from pipeline.chain.changes import recipe_changes
from pipeline.chain.consequences import consequences
from pipeline.chain.stage_task import RunContext, StageTask
from pipeline.common.contracts import read_contract
from pipeline.common.errors import Interrupted, MainProcessStopped, UserError
from pipeline.common.fault_injection import fault
from pipeline.common.files import FileError, free_name, write_json
from pipeline.common.folder_lock import held
from pipeline.common.tables import shortest
from pipeline.data.images import find_images
from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import YamlNode
from pipeline.tracking.outbox import PATIENCE, Outbox
from pipeline.tracking.store import EndState, Run, Store
from pipeline.tracking.tags import ChainTags, StageTags
from pipeline.weights.metadata import CheckpointError, read_digest
from pipeline.weights.published import PublicationRecord

if TYPE_CHECKING:
    import torch

    from pipeline.weights.training_state import Progress

Status = Literal["done", "cut off", "refused", "stale", "missing"]
PATIENCE_INTERRUPTED = 10.0
"""Seconds to send the remaining log entries to MLflow after a signal to stop."""


class ChainError(UserError):
    """The stages or their source files cannot be used together."""


@dataclass(frozen=True)
class ChainFacts:
    """Contents of `chain.json` in the chain's folder."""

    identity: str
    """Key by which the chain's runs are found in MLflow."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its status and the reason."""

    task: StageTask
    status: Status
    reason: str

    @property
    def progress(self) -> Progress | None:
        """The progress of the training that `run` would continue; None if it would begin one, or train nothing."""
        return self.task.states.progress() if self.status in ("cut off", "refused") else None

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.task.stage.name


class Chain:
    """The stages from a root to a target, under runs/<recipe>/lmbda-<λ>[-seed-<s>]/<stage>.

    The seed is the root's. Each λ and each seed has its own folder. With the file `baseline` the root is imported; with
    the file `start` the root's training starts from those weights.
    """

    def __init__(
        self,
        recipe: str,
        stages: Sequence[Stage],
        runs: Path,
        baseline: Path | None = None,
        start: Path | None = None,
        sources: Mapping[str, YamlNode] | None = None,
    ):
        self.recipe, self.lmbda, self.runs = recipe, stages[-1].lmbda, runs
        self.precision = stages[0].precision
        self.seed = stages[0].seed
        self.folder = runs / recipe / (f"lmbda-{shortest(self.lmbda)}" + (f"-seed-{self.seed}" if self.seed else ""))
        self.tasks = []
        find = cache(partial(find_images, runs=runs))
        for stage in stages:
            parent = self.folder / stage.parent / "checkpoint.safetensors" if stage.parent else None
            files = (None, None) if stage.parent else (baseline, start)
            task = StageTask(
                stage, self.folder / stage.name, parent, *files, find=find, source=(sources or {}).get(stage.name)
            )
            for file in filter(None, files):
                if file.absolute() == task.checkpoint.absolute():
                    raise ChainError(f"{file}: this is the chain's own {stage.name}; do not give it as an option")
            self.tasks.append(task)
        self.outbox: Outbox | None = None

    def plan(self) -> list[PlannedStage]:
        """The status of every stage, root first. Raises the errors of reading the inputs."""
        self.tasks[-1].check_folders()
        planned: list[PlannedStage] = []
        for task in self.tasks:
            before = planned[-1] if planned else None
            planned.append(_status_of(task, before))
        return planned

    def run(self, context: RunContext) -> None:
        """Run the missing, interrupted and stale stages. Raises the error that stops a stage.

        The stage's last saved state is kept. Raises FolderInUse if another process runs a chain in the same folder.
        """
        from pipeline.chain.precheck import check_stages  # imports PyTorch, which a plan does not need
        from pipeline.data.crops import noticing_lost_workers

        check_stages(self.tasks)
        with context.processes.noticing_lost_processes(), noticing_lost_workers(), ExitStack() as exits:
            context.on_main_process(lambda: self._enter(context, exits))
            try:
                self._run_stages(context)
            except BaseException as error:
                if self.outbox is not None:
                    self.outbox.close(PATIENCE_INTERRUPTED if _end_state(error) == "KILLED" else PATIENCE)
                raise
            if self.outbox is not None:
                self.outbox.close()
            # The chain is finished, but the signal must also stop the command that runs it.
            if signum := context.processes.agreed_signal():
                raise Interrupted(signum)

    def _enter(self, context: RunContext, exits: ExitStack) -> None:
        exits.enter_context(held(self.folder))
        self._start_over(context)
        self.outbox = Outbox(self.folder / "outbox", Store.default(self.runs), context.watcher.note)

    def _run_stages(self, context: RunContext) -> None:
        from pipeline.tracking.provenance import source_tags
        from pipeline.tracking.published_stage import log_chain

        plan = self.plan()
        context.wait_for_everyone()
        chain_run = self._chain_run()
        chain_run.tags(source_tags(context.processes.accelerator.device))
        try:
            for number, planned in enumerate(plan):
                if signum := context.processes.agreed_signal():
                    raise Interrupted(signum)
                # The status depends on the parent, now built. All processes compute it before one changes a file.
                now = _status_of(planned.task, None) if number else planned
                context.processes.agree_on(partial(_facts_of, now, context.processes.accelerator.device))
                context.wait_for_everyone()
                self._run_stage(now, context, chain_run)
                log_chain(chain_run, self._tags, self._records())
        except BaseException as error:
            with suppress(FileError):
                chain_run.end(_end_state(error))
            raise
        chain_run.end("FINISHED")

    def _run_stage(self, planned: PlannedStage, context: RunContext, chain_run: Run) -> None:
        context.watcher.note(f"{planned.name}: {'done' if planned.status == 'done' else planned.reason}")
        if planned.status == "done":
            if context.is_main:
                planned.task.states.forget()  # A kill after publication may leave states.
            return
        if planned.status == "stale":
            context.on_main_process(lambda: self._set_aside(planned.task))
        from pipeline.chain.stage import StageRun
        from pipeline.tracking.system_metrics import sampling

        fault("stage")
        run = self._stage_run(planned, chain_run)
        stage_run = StageRun(planned.task, context, run)
        try:
            with sampling(run):
                stage_run.execute()
        except BaseException as error:
            with suppress(FileError):
                stage_run.note_end(error)
                run.end(_end_state(error))
            raise

    def _chain_run(self) -> Run:
        if self.outbox is None:
            return Run()
        name = f"{self.recipe} λ={shortest(self.lmbda)}" + (f" seed {self.seed}" if self.seed else "")
        run = self.outbox.run(self._facts().identity, name, tags=self._tags.to_tags())
        run.parameters({"recipe": self.recipe, "lmbda": self.lmbda, "stages": [task.stage.name for task in self.tasks]})
        return run

    def _stage_run(self, planned: PlannedStage, chain_run: Run) -> Run:
        if self.outbox is None:
            return Run()
        key = f"{chain_run.key}/{planned.name}/{planned.task.states.run_key()}"
        tags = {**self._tags.to_tags(), **StageTags(stage=planned.name).to_tags()}
        return self.outbox.run(key, f"{self.recipe} {planned.name}", chain_run, tags)

    def _records(self) -> dict[str, PublicationRecord]:
        """The records of the published stages, by name."""
        found = {task.stage.name: _record(task) for task in self.tasks}
        return {name: record for name, record in found.items() if record is not None}

    @property
    def _tags(self) -> ChainTags:
        return ChainTags(self.recipe, self.lmbda, self.seed)

    def _facts(self) -> ChainFacts:
        path = self.folder / "chain.json"
        if not path.exists():
            write_json(path, asdict(ChainFacts(uuid.uuid4().hex)))
        try:
            return read_contract(ChainFacts, path)
        except FileError as error:
            raise ChainError(f"{error}.\n  Delete the file; MLflow then gets new runs for this chain.") from error

    def _start_over(self, context: RunContext) -> None:
        """Ask before a run without what its recipe needs and before finished stages are rebuilt.

        Then move away results and states for `--force` and `--fresh`.
        """
        wish, target = context.rebuild, self.tasks[-1]
        published = [target] if wish.force and target.record.is_file() else []
        begun = [task for task in self.tasks if wish.fresh and task.is_begun]
        found = consequences(self, self.plan(), published, begun, context.processes.accelerator.device.type)
        if found:
            wish.confirm(found)
        for task in begun:
            task.abandon_states()
            fault("abandon")
        for task in published:
            self._set_aside(task)

    def _set_aside(self, task: StageTask) -> None:
        """Move a published stage's folder to `superseded/`. Nothing is deleted."""
        record = _record(task)
        if record is not None:
            task.states_of(record.inputs).forget()  # A kill after publication may leave states.
        digest = record.digest if record else "damaged"
        free_name(self.folder / "superseded" / f"{task.stage.name}-{digest[:12]}", task.folder.rename)
        fault("set-aside")


def _end_state(error: BaseException) -> EndState:
    return "KILLED" if isinstance(error, Interrupted | KeyboardInterrupt | MainProcessStopped) else "FAILED"


def _facts_of(planned: PlannedStage, device: torch.device) -> dict[str, str]:
    return {"status": planned.status, **planned.task.facts(device)}


def _status_of(task: StageTask, before: PlannedStage | None) -> PlannedStage:
    """A stage's status. `before` is its parent's plan; None for a root, or if the parent is published."""
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
        trained = progress.segment == len(task.stage.schedule)
        if trained and (reasons := refusal_reasons(task.states.folder, task.stage.accept)):
            return PlannedStage(task, "refused", f"refused: {'; '.join(reasons)}; --accept-anyway publishes it")
        at = f"{names[progress.segment]} at step {progress.step}"
        return PlannedStage(task, "cut off", f"cut off in {at}")
    other = task.states.other_form()
    passed = f"; an interrupted training with other inputs is kept: {_differences(other, inputs)}" if other else ""
    return PlannedStage(task, "missing", f"not built yet{passed}")


def _check_source(task: StageTask) -> None:
    """Raise ChainError if a root came from a file and none is given: the option was probably forgotten."""
    if task.imported or task.start:
        return
    record = _record(task)
    for option, make in (("baseline", " (with make: BASELINE=)"), ("start", "")):
        if record and option in record.inputs:
            raise ChainError(
                f"{task.folder}: this stage was made from a file; give it again with --{option}{make}.\n"
                "  To train the stage from random weights instead, choose another folder with --runs."
            )


def _record(task: StageTask) -> PublicationRecord | None:
    """The record of a published stage; None if the file is damaged."""
    try:
        return PublicationRecord.read(task.record)
    except FileError:
        return None


def _changes(task: StageTask, inputs: dict[str, str]) -> str:
    """Why a published stage is not current, or an empty string."""
    try:
        record = PublicationRecord.read(task.record)
        digest = read_digest(task.checkpoint)
    except (FileError, CheckpointError) as error:
        return str(error)
    if digest != record.digest:
        return "the checkpoint differs from the recorded one"
    changed = _differences(record.inputs, inputs)
    if "recipe changed" in changed and (by_key := recipe_changes(task.checkpoint, task.stage)):
        changed = changed.replace("recipe changed", f"recipe changed ({by_key})")
    return changed


def _differences(known: dict[str, str], inputs: dict[str, str]) -> str:
    return ", ".join(
        f"{name} changed" if name in known and name in inputs else f"{name} is {'new' if name in inputs else 'gone'}"
        for name in sorted(known.keys() | inputs.keys())
        if known.get(name) != inputs.get(name)
    )
