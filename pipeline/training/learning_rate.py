"""The learning rate within a segment."""

import math

from pipeline.recipes.schema import Segment, StepDecay


def schedule_factor(segment: Segment, step: int) -> float:
    """Factor of the learning rates at a step: linear warm-up times the segment's decay."""
    rise = min(1.0, (step + 1) / segment.warmup) if segment.warmup else 1.0
    return rise * _decayed(segment, step)


def _decayed(segment: Segment, step: int) -> float:
    if isinstance(segment.decay, StepDecay):
        drops = sum(step >= at for at in segment.decay.at)
        return float(segment.decay.factor**drops)
    return 0.5 * (1 + math.cos(math.pi * step / segment.steps)) if segment.decay == "cosine" else 1.0
