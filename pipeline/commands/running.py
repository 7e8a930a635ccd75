"""Running a chain from the command line. Only the first process shows progress."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import typer

from pipeline.chain.chain import Chain
from pipeline.chain.context import RunContext
from pipeline.chain.lambda_sweep import steps_left
from pipeline.chain.plan import PlannedStage
from pipeline.chain.run import run_chain
from pipeline.commands.chain_options import RunOptions
from pipeline.commands.display import IS_FIRST_PROCESS, console
from pipeline.commands.progress import ProgressWatcher
from pipeline.common.errors import UserError
from pipeline.common.processes import ProcessGroup, start_accelerator
from pipeline.common.timing import machine
from pipeline.tracking.live import live_mirror
from pipeline.tracking.store import Store
from pipeline.tracking.system_metrics import sampling
from pipeline.training.reporting import Watcher


class NotConfirmed(UserError):
    """Nobody agreed to the consequences of a command. Nothing was changed."""


def run_planned(
    chain: Chain, plan: Sequence[PlannedStage], options: RunOptions, force: bool = False, fresh: bool = False
) -> None:
    """Run a plan on the processes that `accelerate launch` started; raises what `run_chain` raises."""
    accelerator = start_accelerator(chain.precision)
    watching: AbstractContextManager[Watcher] = nullcontext(Watcher())
    if IS_FIRST_PROCESS:
        target = chain.tasks[-1]
        images = [
            f"{len(photos.paths)} {use} image{'s' if len(photos.paths) > 1 else ''} ({photos.source})"
            for use, photos in (("training", target.train_photos), ("validation", target.val_photos))
        ]
        console.print(f"{', '.join(images)}; on {machine(str(accelerator.device))}")
        watching = ProgressWatcher(steps_left(plan), options.verbose)
    with ProcessGroup(accelerator) as processes, watching as watcher:
        context = RunContext(
            processes, watcher, options.accept_anyway, force, fresh, partial(confirm, options.yes),
            mirror=partial(live_mirror, Store.default(chain.runs), watcher.note), sample=sampling,
        )  # fmt: skip
        run_chain(chain, plan, context)


def confirm(yes: bool, consequences: list[str]) -> None:
    """Print the consequences and ask whether to continue. Raises NotConfirmed if not. With `yes`, do not ask."""
    for line in consequences:
        typer.echo(line)
    if yes:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed(
            "nothing was changed: there is no terminal for the question; give --yes to agree (with make: ARGS=--yes)"
        )
    if not typer.confirm("Continue?"):
        raise NotConfirmed("nothing was changed")
