"""Runs a chain: plan, ask, then each stage that is not done."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch

from pipeline.chain.chain import Chain
from pipeline.chain.consequences import consequences
from pipeline.chain.context import RunContext
from pipeline.chain.plan import PlannedStage, status_of
from pipeline.chain.precheck import check_stages
from pipeline.chain.stage import StageRun
from pipeline.common.errors import Interrupted
from pipeline.common.fault_injection import fault
from pipeline.common.folder_lock import held
from pipeline.data.crops import noticing_lost_workers


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
            if signum := processes.agreed_signal():
                raise Interrupted(signum)
            planned = status_of(task)
            processes.agree_on(partial(_facts_of, planned, processes.accelerator.device))
            processes.accelerator.wait_for_everyone()  # No process changes a file before all have seen it.
            forced = context.rebuild.force and task is chain.tasks[-1]
            if planned.status == "done" and not forced:
                context.watcher.note(f"{planned.name}: done")
                continue
            context.watcher.note(f"{planned.name}: {'forced' if planned.status == 'done' else planned.reason}")
            fault("stage")
            StageRun(task, context, facts).run()
        # The chain is finished, but the signal must also stop the command that runs it.
        if signum := processes.agreed_signal():
            raise Interrupted(signum)


def _prepare(chain: Chain, plan: Sequence[PlannedStage], context: RunContext, exits: ExitStack) -> None:
    """Lock the folder, ask what must be asked, move away trainings to restart, and begin what works beside the run."""
    exits.enter_context(held(chain.folder))
    target, rebuild = plan[-1], context.rebuild
    forced = target.task if rebuild.force and target.task.is_published else None
    restarted = [task for task in chain.tasks if rebuild.fresh and task.is_begun]
    device = context.processes.accelerator.device.type
    if found := consequences(chain, plan, forced, restarted, device):
        rebuild.confirm(found)
    for task in restarted:
        task.abandon()
        fault("abandon")
    chain.facts()
    exits.enter_context(context.mirror(chain.folder))


def _facts_of(planned: PlannedStage, device: torch.device) -> dict[str, str]:
    return {"status": planned.status, **planned.task.facts(device)}
