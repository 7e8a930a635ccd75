"""Gain or loss of each phase against its reference, over seeds, and what its designers expected."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.common.tables import shortest
from pipeline.evidence import rate_distortion
from pipeline.evidence.comparison import Comparison
from pipeline.evidence.rate_distortion import Delta
from pipeline.tracking.records import ChainRecord
from pipeline.weights.published import Quality

EXPECTED: Mapping[str, tuple[tuple[float, float], ...]] = {
    "time": ((-25, -15), (-45, -30), (-50, -35), (-55, -40)),
    "memory": ((-20, -15), (-38, -32), (-40, -35), (-45, -38)),
    "rate": ((-3, -2), (-5, -3), (-6, -4), (-8, -5)),
    "psnr": ((0.1, 0.2), (0.2, 0.4), (0.25, 0.45), (0.3, 0.55)),
}
"""Changes against the Baseline, in per cent and dB, that the design expects of Phases 1 to 4 but did not measure."""
COMPARED_AT = "512×768"
TANGENT_REACH = 1.0
"""Largest PSNR difference in dB for which a tangent approximates the curve."""


@dataclass(frozen=True)
class Spread:
    """A value over seeds: mean, standard deviation (None for one seed) and number of seeds."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of the values; None if there are none."""
        if not values:
            return None
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """`+0.012 ± 0.003`, the deviation in the same form without its sign."""
        shown = format(self.mean, form)
        return shown if self.deviation is None else f"{shown} ± {format(self.deviation, form.lstrip('+'))}"


@dataclass(frozen=True)
class Gain:
    """A stage against its reference in the same chains, with one value per seed.

    Rate at equal PSNR and PSNR at equal rate are first-order estimates along the tangent of the reference's curve. If
    only one λ was trained, the slope is that of a codec at the optimum of its loss, which is known only for MSE.
    """

    stage: str
    reference: str
    fair: bool
    """Whether the reference was trained for as many steps as the stage. If not, the differences are not gains."""
    lmbda: float
    bpp: Spread
    psnr_db: Spread
    loss: Spread
    rate_percent: Spread | None
    """Per cent of the reference's rate, at equal PSNR; None if the slope is unknown, the PSNRs are too far
    apart, or the reference is not fair."""
    psnr_at_equal_rate: Spread | None
    """dB; None in the same cases."""


@dataclass(frozen=True)
class Claim:
    """One expectation and its measurement; `measured` is None if there is none.

    A claim is not `fair`, and has no measurement, if the reference was trained for another number of steps.
    """

    quantity: str
    phase: int
    expected: tuple[float, float]
    measured: Spread | None
    fair: bool

    @property
    def holds(self) -> bool | None:
        """Whether the mean reaches the end of the expected range nearer to 0; None if not measured."""
        if self.measured is None:
            return None
        low, high = self.expected
        return self.measured.mean >= low if low > 0 else self.measured.mean <= high


def gains(chains: Sequence[ChainRecord]) -> list[Gain]:
    """The gains of all stages that have a reference, by λ."""
    references, curves = rate_distortion.references(chains), rate_distortion.curves(chains)
    uncontrolled = rate_distortion.uncontrolled(chains)
    found = []
    for lmbda in sorted({chain.lmbda for chain in chains}):
        for name, reference in references.items():
            both = [c for c in chains if c.lmbda == lmbda and {name, reference} <= c.published.keys()]
            if both:
                slope = rate_distortion.slope(curves[reference], lmbda)
                found.append(_gain((name, reference, name not in uncontrolled), both, slope))
    return found


def _gain(compared: tuple[str, str, bool], chains: Sequence[ChainRecord], slope: float | None) -> Gain:
    """The gain at one λ of a stage against a reference.

    `slope` is that of the reference's curve, in dB per (bit per pixel).
    """
    name, reference, fair = compared
    pairs = [(chain.published[name].quality, chain.published[reference].quality) for chain in chains]
    metric = chains[0].published[name].parameters.get("metric")

    def over_seeds(value: Callable[..., float]) -> Spread:
        spread = Spread.of([value(*pair) for pair in pairs])
        assert spread is not None  # there is a pair
        return spread

    if not fair or over_seeds(lambda a, b: abs(a.psnr_db - b.psnr_db)).mean > TANGENT_REACH:
        slope = None
    elif slope is None and metric == "mse":
        slope = over_seeds(lambda a, b: _slope_at_optimum(b, chains[0].lmbda)).mean
    return Gain(
        name, reference, fair, chains[0].lmbda,
        over_seeds(lambda a, b: a.bpp - b.bpp),
        over_seeds(lambda a, b: a.psnr_db - b.psnr_db),
        over_seeds(lambda a, b: a.rd_loss - b.rd_loss),
        over_seeds(lambda a, b: 100 * (a.bpp - b.bpp - (a.psnr_db - b.psnr_db) / slope) / b.bpp) if slope else None,
        over_seeds(lambda a, b: a.psnr_db - b.psnr_db - slope * (a.bpp - b.bpp)) if slope else None,
    )  # fmt: skip


def _slope_at_optimum(quality: Quality, lmbda: float) -> float:
    """The slope along which λ·255²·MSE + bits per pixel is constant, in dB per (bit per pixel)."""
    return 10 / math.log(10) / (lmbda * 255**2 * 10 ** (-quality.psnr_db / 10))


def claims(phase_gains: Sequence[Gain], deltas: Mapping[str, Delta], comparison: Comparison | None) -> list[Claim]:
    """Every expectation with the best available measurement.

    Rate and PSNR are shown at the λ with most seeds. If several λ were trained, Bjøntegaard deltas are shown too,
    without deviation. Time and memory are those of a comparison at 512×768, or else at its largest size.
    """
    best = _most_seeds(phase_gains)
    size = f" at {_size(comparison)}" if comparison else ""
    rows: dict[str, Callable[[int], Spread | None]] = {
        f"time, encode and decode{size}": lambda n: _time(comparison, n, ("encode", "decode")),
        f"time, training step{size}": lambda n: _time(comparison, n, ("unfrozen",)),
        f"memory, encode and decode{size}": lambda n: _memory(comparison, n, "decode"),
        f"memory, training step{size}": lambda n: _memory(comparison, n, "unfrozen"),
    }
    if deltas:
        rows["rate, BD over all λ"] = lambda n: _single(deltas.get(f"phase{n}"), "bd_rate")
        rows["psnr, BD over all λ"] = lambda n: _single(deltas.get(f"phase{n}"), "bd_psnr")
    if best:
        at = f"at λ = {shortest(next(iter(best.values())).lmbda)}"
        rows[f"rate, {at}"] = lambda n: best[n].rate_percent if n in best else None
        rows[f"psnr, {at}"] = lambda n: best[n].psnr_at_equal_rate if n in best else None
    controlled = {gain.stage for gain in phase_gains if gain.fair}
    order = {"time": 0, "memory": 1, "rate": 2, "psnr": 3}
    return [
        Claim(
            quantity, phase, EXPECTED[kind][phase - 1], measure(phase),
            kind in ("time", "memory") or f"phase{phase}" in controlled,
        )
        for quantity, measure in sorted(rows.items(), key=lambda row: order[row[0].split(",")[0]])
        for kind in quantity.split(",")[:1]
        for phase in range(1, 5)
    ]  # fmt: skip


def _most_seeds(found: Iterable[Gain]) -> dict[int, Gain]:
    """The gains of Phases 1 to 4 at the λ with most seeds; the middle λ if several have as many."""
    by_lmbda: dict[float, dict[int, Gain]] = {}
    for gain in found:
        if gain.stage in {f"phase{n}" for n in range(1, 5)}:
            by_lmbda.setdefault(gain.lmbda, {})[int(gain.stage[-1])] = gain
    if not by_lmbda:
        return {}
    seeds = {lmbda: max(gain.loss.count for gain in group.values()) for lmbda, group in by_lmbda.items()}
    candidates = sorted(lmbda for lmbda in by_lmbda if seeds[lmbda] == max(seeds.values()))
    return by_lmbda[candidates[len(candidates) // 2]]


def _single(found: Delta | None, field: str) -> Spread | None:
    value = getattr(found, field) if found else None
    return None if value is None else Spread(value, None, 1)


def _size(comparison: Comparison) -> str:
    return COMPARED_AT if COMPARED_AT in comparison.sizes else comparison.sizes[-1]


def _time(comparison: Comparison | None, phase: int, activities: Sequence[str]) -> Spread | None:
    """Change of time in per cent against the first codec: median and standard deviation of the rounds' ratios."""
    if comparison is None:
        return None
    sums = []
    for codec in (f"phase{phase}", comparison.codecs[0]):
        costs = [comparison.cost(codec, _size(comparison), activity) for activity in activities]
        samples = [cost.samples for cost in costs if cost is not None]
        if len(samples) < len(activities):
            return None
        sums.append([sum(times) for times in zip(*samples, strict=True)])
    ratios = [100 * (ours / theirs - 1) for ours, theirs in zip(*sums, strict=True)]
    return Spread(statistics.median(ratios), statistics.stdev(ratios) if len(ratios) > 1 else None, len(ratios))


def _memory(comparison: Comparison | None, phase: int, activity: str) -> Spread | None:
    if comparison is None:
        return None
    ours, theirs = (comparison.peak(c, _size(comparison), activity) for c in (f"phase{phase}", comparison.codecs[0]))
    return Spread(100 * (ours / theirs - 1), None, 1) if ours and theirs else None
