"""Measures the segments of chains before they are trained: their time and memory, and what makes them fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from pipeline.chain.plan import PlannedStage
from pipeline.chain.stage_codec import codec_config
from pipeline.common.fresh_process import in_fresh_process
from pipeline.data.images import Photos
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.estimate import Estimate, EvaluationCost, SegmentEstimate, StepCost
from pipeline.training.trial import Trial, try_evaluation, try_segment

NO_REMEDY = "does not fit with any smaller batch; use a device with more memory, or a smaller data.crop"


def measure(plan: Sequence[PlannedStage], processes: int, note: Callable[[str], None]) -> Estimate:
    """Try each unfinished segment of a plan in a process of its own, with the crops of one of `processes`."""
    device, segments = "", list[SegmentEstimate]()
    configs = {planned.name: codec_config(planned.task) for planned in plan}
    for planned, segment, _ in segments_left(plan):
        note(f"{planned.name}: measuring {segment.name}")
        stage, photos = planned.task.stage, planned.task.train_photos
        alone = stage.model_copy(update={"schedule": (segment,)})
        trial = Trial(alone, configs[planned.name], configs[stage.parent] if stage.parent else None)
        found, remedy = _try(trial, photos, processes), ""
        if found is None:
            note(f"{planned.name}: {segment.name} does not fit; looking for a change that makes it fit")
            changes = (text for text, changed in _changes(alone, processes)
                       if _try(replace(trial, stage=changed), photos, processes))  # fmt: skip
            remedy = next((f"fits with {text}" for text in changes), NO_REMEDY)
        device, cost = found or (device, None)
        name, steps, handover, data = segment.name, segment.steps, segment.handover, stage.data
        segments.append(SegmentEstimate(stage.name, name, steps, handover, data.batch_size, data.workers, cost, remedy))
    evaluations: dict[str, EvaluationCost | None] = {}
    for planned in (planned for planned in plan if planned.trains):
        note(f"{planned.name}: measuring the evaluation")
        trial = Trial(planned.task.stage, configs[planned.name], None)
        evaluations[planned.name] = in_fresh_process(try_evaluation, trial, planned.task.val_photos)
    return Estimate(device, processes, tuple(segments), evaluations)


def segments_left(plan: Sequence[PlannedStage]) -> Iterator[tuple[PlannedStage, Segment, int]]:
    """The segments that are not finished, each with its stage and the steps done in it."""
    for planned in plan:
        if not planned.trains:
            continue
        progress = planned.progress
        for number, segment in enumerate(planned.task.stage.schedule):
            if progress is None or number >= progress.segment:
                yield planned, segment, progress.step if progress and number == progress.segment else 0


def seconds_left(plan: Sequence[PlannedStage], estimate: Estimate) -> dict[str, float]:
    """Seconds of training and evaluation left in each stage of a plan, by name; infinite if something does not fit."""
    found = {planned.name: evaluation_seconds_left(planned, estimate) for planned in plan if planned.trains}
    for planned, segment, done in segments_left(plan):
        cost = estimate.find(planned.name, segment.name, segment.steps, segment.handover)
        found[planned.name] += cost.seconds(done) if cost else math.inf
    return found


def evaluation_seconds_left(planned: PlannedStage, estimate: Estimate) -> float:
    """Seconds of a stage's evaluations that are left; infinite if the validation images do not fit.

    The rate is estimated for parent and child before the first step, every `validate_every` steps, and after each
    segment. At the end of the stage the images are coded.
    """
    cost = estimate.evaluations.get(planned.name)
    if cost is None:
        return math.inf
    stage = planned.task.stage
    passes = 2 if stage.parent and planned.progress is None else 0
    for _, segment, done in segments_left([planned]):
        passes += 1
        if stage.validate_every:
            first = max(done, segment.handover - 1)
            passes += (segment.steps - 1) // stage.validate_every - first // stage.validate_every
    return passes * cost.estimate_seconds + cost.coding_seconds


def _try(trial: Trial, photos: Photos, processes: int) -> tuple[str, StepCost] | None:
    """The device, and the cost of a step with the crops of one of `processes`; None if it does not fit."""
    data = trial.stage.data
    share = data.model_copy(update={"batch_size": max(1, data.batch_size // processes)})
    return in_fresh_process(try_segment, replace(trial, stage=trial.stage.model_copy(update={"data": share})), photos)


def _changes(stage: Stage, processes: int) -> Iterator[tuple[str, Stage]]:
    """Changes that save memory, the smallest first: recompute activations, then divide the batch."""
    texts = []
    if not stage.gradient_checkpointing:
        stage = stage.model_copy(update={"gradient_checkpointing": True})
        texts = [f"{stage.name}.gradient_checkpointing=true"]
        yield texts[0], stage
    size, parts = stage.data.batch_size, 2
    while size // parts >= processes:
        if size % parts == 0:
            data = stage.data.model_copy(update={"batch_size": size // parts})
            divided = f"{stage.name}.data.accumulate={parts} ({size // parts} crops at a time)"
            yield " and ".join([*texts, divided]), stage.model_copy(update={"data": data})
        parts *= 2
