"""The tables of `hpcm plan --measure`."""

import math
from collections.abc import Iterable, Mapping, Sequence

from pipeline.chain.measuring import evaluation_seconds_left, measure, seconds_left
from pipeline.chain.plan import PlannedStage
from pipeline.chain.precheck import check_stages
from pipeline.commands.display import duration, errors, show
from pipeline.common.errors import UserError
from pipeline.common.tables import Table
from pipeline.training.estimate import Estimate, EvaluationCost, StepCost


class DoesNotFit(UserError):
    """A segment or the validation images do not fit into the memory."""


def show_measured(plans: Mapping[str, Sequence[PlannedStage]], processes: int) -> None:
    """Measure the stages of all chains, print their times and memory, and save these in the chains' folders.

    Chains differ in λ and seed, which do not change the cost, so each stage is measured once. Raises DoesNotFit at
    the end if something does not fit.
    """
    for plan in plans.values():
        check_stages([planned.task for planned in plan])
    stages: dict[str, PlannedStage] = {}
    for planned in (planned for plan in plans.values() for planned in plan):
        if planned.name not in stages or stages[planned.name].status == "done":
            stages[planned.name] = planned
    estimate = measure(list(stages.values()), processes, lambda line: errors.print(f"  {line}", soft_wrap=True))
    for plan in plans.values():
        if plan:
            estimate.write(plan[0].task.folder.parent)
    show(segment_table(stages.values(), estimate), time_table(plans, estimate))
    lines = [f"  {found.stage}, {found.segment}: {found.remedy}" for found in estimate.segments if found.cost is None]
    lines += [
        f"  {stage}, evaluation: use smaller validation images (data.val)"
        for stage, cost in estimate.evaluations.items()
        if cost is None
    ]
    if lines:
        raise DoesNotFit("\n".join(["not enough memory:", *lines]))


def segment_table(stages: Iterable[PlannedStage], estimate: Estimate) -> Table:
    """A row per segment and evaluation: time of a step, speed, what limits the speed, memory, and time of all of it."""
    processes = f", as one of {estimate.processes} processes" if estimate.processes > 1 else ""
    columns = ("stage", "segment", "steps", "s/step", "images/s", "limit", "GPU GB", "process GB", "time")
    table = Table(f"measured on {estimate.device or 'this machine'}{processes}", columns, left=2)
    for planned in stages:
        for found in (found for found in estimate.segments if found.stage == planned.name):
            speed = (f"{found.pace:.3f}", f"{found.batch_size / found.pace:.1f}", found.limit) if found.cost else ()
            table.add(found.stage, found.segment, f"{found.steps:,}", *_cells(speed, found.cost, found.seconds()))
        if planned.name in estimate.evaluations:
            cells = _cells(
                ("–", "–", "–"), estimate.evaluations[planned.name], evaluation_seconds_left(planned, estimate)
            )
            table.add(planned.name, "evaluation", "–", *cells)
    return table


def _cells(speed: Sequence[str], cost: StepCost | EvaluationCost | None, seconds: float) -> tuple[str, ...]:
    if cost is None:
        return "–", "–", "memory", "–", "–", "–"
    gpu = "–" if cost.device_bytes is None else f"{cost.device_bytes / 1e9:.1f}"
    return *speed, gpu, f"{cost.process_bytes / 1e9:.1f}", duration(seconds)


def time_table(plans: Mapping[str, Sequence[PlannedStage]], estimate: Estimate) -> Table:
    """The time left: one row per stage, one column per chain, and sums."""
    columns = {title: seconds_left(plan, estimate) for title, plan in plans.items()}
    table = Table("time left", ("stage", *columns))
    for name in dict.fromkeys(name for times in columns.values() for name in times):
        table.add(name, *(_time(times[name]) if name in times else "done" for times in columns.values()))
    sums = [sum(times.values()) for times in columns.values()]
    table.add("chain", *map(_time, sums))
    if len(columns) > 1:
        table.add("sweep", _time(sum(sums)), *[""] * (len(columns) - 1))
    return table


def _time(seconds: float) -> str:
    return "does not fit" if math.isinf(seconds) else duration(seconds)
