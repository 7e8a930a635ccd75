"""Running a chain from the command line. Only the first process shows progress."""

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator

from pipeline.chain.chain import Chain
from pipeline.chain.stage_task import Rebuild, RunContext
from pipeline.commands.progress import ProgressWatcher, to_train
from pipeline.common.processes import ProcessGroup
from pipeline.training.watcher import Watcher


def run_chain(
    chain: Chain, accelerator: Accelerator, accept_anyway: bool, rebuild: Rebuild | None = None, verbose: bool = False
) -> None:
    """Run a chain on the processes of `accelerator`; raises what `Chain.run` raises."""
    rebuild = rebuild or Rebuild()
    watching: AbstractContextManager[Watcher] = nullcontext(Watcher())
    if accelerator.is_main_process:
        watching = ProgressWatcher(to_train(chain.plan(), rebuild.force), verbose)
    with ProcessGroup(accelerator) as processes, watching as watcher:
        chain.run(RunContext(chain.folder, processes, watcher, accept_anyway, rebuild))
