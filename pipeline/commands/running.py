"""Running a chain from the command line. Only the first process shows progress."""

from contextlib import AbstractContextManager, nullcontext

from pipeline.chain.chain import Chain
from pipeline.chain.lambda_sweep import steps_left
from pipeline.chain.stage_task import Rebuild, RunContext
from pipeline.commands.display import IS_FIRST_PROCESS, console
from pipeline.commands.progress import ProgressWatcher
from pipeline.common.processes import ProcessGroup, start_accelerator
from pipeline.common.timing import machine
from pipeline.training.watcher import Watcher


def run_planned(chain: Chain, accept_anyway: bool, rebuild: Rebuild, verbose: bool) -> None:
    """Run a chain on the processes that `accelerate launch` started; raises what `Chain.run` raises."""
    accelerator = start_accelerator(chain.precision)
    watching: AbstractContextManager[Watcher] = nullcontext(Watcher())
    if IS_FIRST_PROCESS:
        console.print(f"{_images(chain)}; on {machine(str(accelerator.device))}", soft_wrap=True)
        watching = ProgressWatcher(steps_left(chain.plan(), rebuild.force), verbose)
    with ProcessGroup(accelerator) as processes, watching as watcher:
        chain.run(RunContext(chain.folder, processes, watcher, accept_anyway, rebuild))


def _images(chain: Chain) -> str:
    """What the last stage trains and validates on."""
    target = chain.tasks[-1]
    found = [
        f"{len(photos.paths)} {use} image{'s' if len(photos.paths) > 1 else ''} ({photos.source})"
        for use, photos in (("training", target.train_photos), ("validation", target.val_photos))
    ]
    return ", ".join(found)
