"""Runs a chain: ask, then each stage that is not done."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import torch

from pipeline.chain.chain import Chain
from pipeline.chain.context import RunContext
from pipeline.chain.plan import FORCED, PlannedStage, status_of
from pipeline.chain.precheck import check_stages
from pipeline.chain.publication import move_into_place
from pipeline.chain.stage import run_stage
from pipeline.chain.stage_codec import StageError, kernel
from pipeline.chain.stage_task import StageTask
from pipeline.common.fault_injection import fault
from pipeline.common.files import free_name, text_digest
from pipeline.common.folder_lock import held
from pipeline.data.crops import noticing_lost_workers
from pipeline.data.images import skipped_lines
from pipeline.records.record import StageRecord

MOST_SKIPPED = 20
"""Most files of a data set that are named because they cannot be used."""


def run_chain(chain: Chain, plan: Sequence[PlannedStage], context: RunContext) -> None:
    """Run the missing, interrupted and stale stages of a plan. Raises the error that stops a stage.

    The stage's last saved state is kept. Raises FolderInUse if another process runs a chain in the same folder.
    """
    processes = context.processes
    with processes.noticing_lost_processes(), noticing_lost_workers(), ExitStack() as exits:
        check_stages(chain.tasks)
        processes.on_main_process(lambda: _prepare(chain, plan, context, exits))
        facts = chain.facts()
        for task in chain.tasks:
            processes.stop_together()
            # The parent is published now, so the stage's status is known.
            planned = status_of(task, force=context.force and task is chain.tasks[-1])
            processes.agree_on(partial(_facts_of, planned, processes.accelerator.device))
            processes.accelerator.wait_for_everyone()  # No process changes a file before all have seen it.
            context.watcher.note(f"{planned.name}: {'done' if planned.status == 'done' else planned.reason}")
            fault("stage")
            if planned.complete is not None:
                processes.on_main_process(partial(move_into_place, planned.complete, task))
            elif planned.status != "done":
                run_stage(task, context, facts)
        processes.stop_together()  # The chain is finished, but the signal must also stop the command that runs it.


def _prepare(chain: Chain, plan: Sequence[PlannedStage], context: RunContext, exits: ExitStack) -> None:
    """Lock the folder, ask what must be asked, move away trainings to restart, and begin what works beside the run."""
    exits.enter_context(held(chain.folder))
    _check_parents(plan)
    todo = [planned for planned in plan if planned.status != "done"]
    restarted = [planned.task for planned in todo if context.fresh and any(planned.task.trainings.glob("*/*"))]
    consequences = list(_consequences(chain, todo, context.processes.accelerator.device.type))
    if chain.doubt and plan[0].status != "done":
        consequences.insert(0, chain.doubt)
    for task in restarted:
        consequences.append(f"{task.stage.name}: the interrupted training moves to {chain.folder / 'abandoned'}")
    if consequences:
        context.confirm(consequences)
    for task in restarted:
        free_name(chain.folder / "abandoned" / task.stage.name, task.trainings.rename)
        fault("abandon")
    used = [photos for planned in todo for photos in (planned.task.train_photos, planned.task.val_photos)]
    for photos in {id(photos): photos for photos in used}.values():
        for line in skipped_lines(photos.skipped, MOST_SKIPPED):
            context.watcher.note(line)
    chain.facts()
    exits.enter_context(context.mirror(chain.folder))


def _check_parents(plan: Sequence[PlannedStage]) -> None:
    """Raise StageError if a stage would train from a published parent whose checkpoint is damaged."""
    for parent, child in pairwise(plan):
        folder = parent.task.folder
        if child.trains and parent.status == "done" and not StageRecord.read(folder).fits_checkpoint(folder):
            raise StageError(
                f"{parent.task.checkpoint}: changed after it was published; nothing was begun.\n"
                f"  Restore the file from its copy in MLflow, or run: hpcm run {parent.name} --force"
            )


def _consequences(chain: Chain, todo: Sequence[PlannedStage], device: str) -> Iterator[str]:
    """One sentence for each need that is not met, and for each finished stage that is replaced."""
    if todo and todo[0].progress is None:  # When a training resumes, the question was asked when it began.
        yield from _unmet_needs(chain.recipe, [planned.task for planned in todo if planned.trains], device)
    for planned in todo:
        if planned.progress is not None or not planned.task.is_published:
            continue
        moves, reason = f"the published stage moves to {chain.folder / 'superseded'}", planned.reason
        if reason == FORCED:
            yield f"{planned.name}: {moves}"
        elif reason.startswith("waits for"):
            yield f"{planned.name}: if {planned.task.stage.parent} changes, it is rebuilt, and {moves}"
        else:
            yield f"{planned.name}: {reason}{'; it is rebuilt' if planned.status == 'stale' else ''}, and {moves}"


def _unmet_needs(recipe: str, trained: Sequence[StageTask], device: str) -> Iterator[str]:
    """One sentence for each need that the stages to train have and a run on this type of device does not meet."""
    if device == "cpu" and any("gpu" in task.stage.needs for task in trained):
        yield f"{recipe} is meant for a GPU, and PyTorch finds none here: on the CPU it takes very long"
    bare = [task for task in trained if "images" in task.stage.needs and task.stage.data.train is None]
    if bare:
        yield (
            f"{recipe} is meant for a data set, and none is given (--data; with make: DATA=): "
            f"it would train on the {len(bare[0].train_photos.paths)} packaged photographs"
        )


def _facts_of(planned: PlannedStage, device: torch.device) -> dict[str, str]:
    """What all processes must agree on before they train together, as short strings by name."""
    task = planned.task
    settings = task.stage.model_dump_json(exclude={"data": {"train", "val"}})  # Paths may differ; images may not.
    found = {"status": planned.status, **{name: digest[:16] for name, digest in task.inputs().items()}}
    found |= {"validation images": task.val_photos.digest[:16], "settings": text_digest(settings)[:16]}
    return {**found, "PyTorch": torch.__version__, "device": device.type, "Bi-WKV4": kernel(task, device)}
