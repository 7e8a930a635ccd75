"""Running a chain from the command line. Only the first process shows progress."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from accelerate import Accelerator

from pipeline.chain.chain import Chain
from pipeline.chain.context import Rebuild, RunContext
from pipeline.chain.plan import PlannedStage
from pipeline.chain.run import run_chain
from pipeline.commands.display import console
from pipeline.commands.progress import ProgressWatcher, to_train
from pipeline.common.processes import ProcessGroup
from pipeline.common.timing import machine
from pipeline.tracking.live import LiveMirror
from pipeline.tracking.store import Store
from pipeline.tracking.system_metrics import sampling
from pipeline.training.watcher import Watcher


def run_planned(
    chain: Chain,
    plan: Sequence[PlannedStage],
    accelerator: Accelerator,
    accept_anyway: bool,
    rebuild: Rebuild,
    verbose: bool = False,
) -> None:
    """Run a chain on the processes of `accelerator`; raises what `run_chain` raises."""
    watching: AbstractContextManager[Watcher] = nullcontext(Watcher())
    if accelerator.is_main_process:
        console.print(_images_and_device(chain, accelerator), soft_wrap=True)
        watching = ProgressWatcher(to_train(plan), verbose)
    with ProcessGroup(accelerator) as processes, watching as watcher:
        mirror = partial(LiveMirror, Store.default(chain.runs), watcher.note)
        run_chain(chain, plan, RunContext(processes, watcher, accept_anyway, rebuild, mirror, sampling))


def _images_and_device(chain: Chain, accelerator: Accelerator) -> str:
    """What the last stage trains and validates on, and where."""
    target = chain.tasks[-1]
    found = [
        f"{len(photos.paths)} {use} image{'s' if len(photos.paths) > 1 else ''} ({photos.source})"
        for use, photos in (("training", target.train_photos), ("validation", target.val_photos))
    ]
    return f"{', '.join(found)}; on {machine(str(accelerator.device))}"
