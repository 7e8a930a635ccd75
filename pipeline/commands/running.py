"""Running a chain from the command line. Only the first process shows progress."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from pipeline.chain.chain import Chain
from pipeline.chain.context import RunContext
from pipeline.chain.lambda_sweep import steps_left
from pipeline.chain.plan import PlannedStage
from pipeline.chain.request import Rebuild
from pipeline.chain.run import run_chain
from pipeline.commands.display import IS_FIRST_PROCESS, console
from pipeline.commands.progress import ProgressWatcher
from pipeline.common.processes import ProcessGroup, start_accelerator
from pipeline.common.timing import machine
from pipeline.tracking.live import live_mirror
from pipeline.tracking.store import Store
from pipeline.tracking.system_metrics import sampling
from pipeline.training.watcher import Watcher


def run_planned(
    chain: Chain, plan: Sequence[PlannedStage], accept_anyway: bool, rebuild: Rebuild, verbose: bool
) -> None:
    """Run a plan on the processes that `accelerate launch` started; raises what `run_chain` raises."""
    accelerator = start_accelerator(chain.precision)
    watching: AbstractContextManager[Watcher] = nullcontext(Watcher())
    if IS_FIRST_PROCESS:
        console.print(f"{_images(chain)}; on {machine(str(accelerator.device))}", soft_wrap=True)
        watching = ProgressWatcher(steps_left(plan), verbose)
    with ProcessGroup(accelerator) as processes, watching as watcher:
        mirror = partial(live_mirror, Store.default(chain.runs), watcher.note)
        run_chain(chain, plan, RunContext(processes, watcher, accept_anyway, rebuild, mirror, sampling))


def _images(chain: Chain) -> str:
    """What the last stage trains and validates on."""
    target = chain.tasks[-1]
    found = [
        f"{len(photos.paths)} {use} image{'s' if len(photos.paths) > 1 else ''} ({photos.source})"
        for use, photos in (("training", target.train_photos), ("validation", target.val_photos))
    ]
    return ", ".join(found)
