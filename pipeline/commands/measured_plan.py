"""The tables of `hpcm plan --measure`."""

from collections.abc import Iterable, Mapping, Sequence

from pipeline.chain.chain import PlannedStage
from pipeline.chain.measuring import measure, seconds_left
from pipeline.commands.display import errors, show
from pipeline.commands.progress import duration
from pipeline.common.errors import UserError
from pipeline.common.tables import Table
from pipeline.training.estimate import Estimate, SegmentEstimate


class DoesNotFit(UserError):
    """A segment does not fit into the memory."""


def show_measured(plans: Mapping[str, Sequence[PlannedStage]], processes: int) -> None:
    """Measure the segments of all chains, print their times and memory, and save these in the chains' folders.

    Chains differ in λ and seed, which do not change the cost, so each segment is measured once. Raises DoesNotFit at
    the end if a segment does not fit.
    """
    stages: dict[str, PlannedStage] = {}
    for planned in (planned for plan in plans.values() for planned in plan):
        if planned.name not in stages or stages[planned.name].status == "done":
            stages[planned.name] = planned
    estimate = measure(list(stages.values()), processes, lambda line: errors.print(f"  {line}", soft_wrap=True))
    for plan in plans.values():
        if plan:
            estimate.write(plan[0].task.folder.parent)
    show(segment_table(estimate), time_table(plans, estimate))
    misfits = [found for found in estimate.segments if found.cost is None]
    if misfits:
        lines = [f"  {found.stage}, {found.segment}: {found.remedy}" for found in misfits]
        raise DoesNotFit("\n".join(["not enough memory:", *lines]))


def segment_table(estimate: Estimate) -> Table:
    """One row per segment: time of a step, speed, what limits the speed, memory, and time of all steps."""
    processes = f", as one of {estimate.processes} processes" if estimate.processes > 1 else ""
    columns = ("stage", "segment", "steps", "s/step", "images/s", "limit", "GPU GB", "process GB", "time")
    table = Table(f"measured on {estimate.device or 'this machine'}{processes}", columns, left=2)
    for found in estimate.segments:
        table.add(found.stage, found.segment, f"{found.steps:,}", *_cells(found))
    return table


def _cells(found: SegmentEstimate) -> tuple[str, ...]:
    cost = found.cost
    if cost is None:
        return "–", "–", "memory", "–", "–", "–"
    gpu = "–" if cost.device_bytes is None else f"{cost.device_bytes / 1e9:.1f}"
    speed = f"{found.batch_size / found.pace:.1f}"
    left = duration(found.seconds_left() or 0.0)
    return f"{found.pace:.3f}", speed, found.limit, gpu, f"{cost.process_bytes / 1e9:.1f}", left


def time_table(plans: Mapping[str, Sequence[PlannedStage]], estimate: Estimate) -> Table:
    """The training time left: one row per stage, one column per chain, and sums."""
    columns = {title: seconds_left(plan, estimate) for title, plan in plans.items()}
    table = Table("training time left, without evaluation", ("stage", *columns))
    for name in dict.fromkeys(name for times in columns.values() for name in times):
        table.add(name, *(_time(times[name]) if name in times else "done" for times in columns.values()))
    sums = [_sum(times.values()) for times in columns.values()]
    table.add("chain", *map(_time, sums))
    if len(columns) > 1:
        table.add("sweep", _time(_sum(sums)), *[""] * (len(columns) - 1))
    return table


def _sum(times: Iterable[float | None]) -> float | None:
    total = 0.0
    for seconds in times:
        if seconds is None:
            return None
        total += seconds
    return total


def _time(seconds: float | None) -> str:
    return "does not fit" if seconds is None else duration(seconds)
