"""One chain run from the command line: signals, progress for the first process, silence for the others."""

from contextlib import nullcontext

from accelerate import Accelerator

from pipeline.chain.chain import Chain
from pipeline.chain.stage_task import Rebuild, RunContext
from pipeline.commands.display import ProgressWatcher
from pipeline.common.processes import ProcessGroup
from pipeline.training.watcher import Watcher


def run_chain(chain: Chain, accelerator: Accelerator, accept_anyway: bool, rebuild: Rebuild | None = None) -> None:
    """Run a chain on the processes of `accelerator`; raises what `Chain.run` raises."""
    with (
        ProcessGroup(accelerator) as processes,
        ProgressWatcher() if accelerator.is_main_process else nullcontext(Watcher()) as watcher,
    ):
        chain.run(RunContext(chain.folder, processes, watcher, accept_anyway, rebuild or Rebuild()))
