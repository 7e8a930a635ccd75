"""Gain or loss of each stage against its control, over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.evidence import rate_distortion
from pipeline.records.chains import ChainRecord
from pipeline.weights.published import Quality

TANGENT_REACH = 1.0
"""Largest PSNR difference in dB for which a tangent approximates the curve."""


@dataclass(frozen=True)
class Spread:
    """A value over seeds: mean, standard deviation (None for one seed) and number of seeds."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of the values, at least one."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """`+0.012 ± 0.003`, the deviation in the same form without its sign."""
        shown = format(self.mean, form)
        return shown if self.deviation is None else f"{shown} ± {format(self.deviation, form.lstrip('+'))}"


@dataclass(frozen=True)
class Gain:
    """A stage against its control in the same chains, with one value per seed."""

    stage: str
    control: str
    lmbda: float
    loss: Spread
    """Difference of the R-D losses."""
    rate_percent: Spread | None
    """Per cent of the control's rate, at equal PSNR: a first-order estimate along the tangent of the control's curve.
    If only one λ was trained, the slope is that of a codec at the optimum of its loss, which is known only for MSE.
    None if the slope is unknown or the PSNRs are too far apart."""


def gains(chains: Sequence[ChainRecord]) -> list[Gain]:
    """The gains of all stages that have a control, by λ."""
    controls, curves = rate_distortion.controls(chains), rate_distortion.curves(chains)
    found = []
    for lmbda in sorted({chain.lmbda for chain in chains}):
        for name, control in controls.items():
            both = [c for c in chains if c.lmbda == lmbda and name in c.published and c.control(name) == control]
            if both:
                found.append(_gain(name, control, both, rate_distortion.slope(curves[control], lmbda)))
    return found


def _gain(name: str, control: str, chains: Sequence[ChainRecord], slope: float | None) -> Gain:
    """The gain at one λ. `slope` is that of the control's curve, in dB per (bit per pixel)."""
    records = [(chain.published[name].record, chain.published[control].record) for chain in chains]
    pairs = [(ours.evaluated.quality, theirs.evaluated.quality) for ours, theirs in records]
    lmbda, validation = chains[0].lmbda, records[0][0].lineage.validation

    def over_seeds(value: Callable[[Quality, Quality], float]) -> Spread:
        return Spread.of([value(*pair) for pair in pairs])

    if over_seeds(lambda a, b: abs(a.psnr_db - b.psnr_db)).mean > TANGENT_REACH:
        slope = None
    elif slope is None and validation is not None and validation.metric == "mse":
        # Along this slope, λ·255²·MSE + bits per pixel is constant.
        slope = over_seeds(lambda a, b: 10 / math.log(10) / (lmbda * 255**2 * 10 ** (-b.psnr_db / 10))).mean
    rate = None
    if slope is not None:
        rate = over_seeds(lambda a, b: 100 * (a.bpp - b.bpp - (a.psnr_db - b.psnr_db) / slope) / b.bpp)
    return Gain(name, control, lmbda, over_seeds(lambda a, b: a.rd_loss - b.rd_loss), rate)
