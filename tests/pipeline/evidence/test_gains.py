"""Gains of stages against their controls, as numbers, tables and figures."""

import math

import pytest
from made import chain, changed, stage

from pipeline.evidence import figures
from pipeline.evidence.gains import Spread, gains
from pipeline.evidence.report_tables import gains_table, quality_table
from pipeline.records.chains import ChainRecord
from pipeline.records.record import DataSet


@pytest.fixture(scope="module")
def made() -> list[ChainRecord]:
    """Two λ, the second with two seeds; Phase 4 takes 5 % less rate than its control at the same PSNR."""
    chains = []
    for lmbda, seed, bpp, psnr in ((0.0018, 0, 0.2, 28.0), (0.013, 0, 0.5, 32.0), (0.013, 1, 0.52, 32.1)):
        control = stage("control4", lmbda, bpp, psnr)
        phase4 = stage("phase4", lmbda, bpp * (0.95 if seed == 0 else 0.93), psnr)
        chains.append(chain(lmbda, seed, stage("baseline", lmbda, bpp * 1.1, psnr, None), control, phase4))
    return chains


def test_a_control_has_the_roots_codec_and_as_many_steps() -> None:
    parents = {
        "baseline": None, "control1": "baseline", "control2": "control1", "phase1": "baseline", "phase2": "phase1",
        "phase3": "phase2", "lean": "baseline",
    }  # fmt: skip
    whole = chain(0.013, 0, *(stage(name, 0.013, 0.5, 32, parent) for name, parent in parents.items()))
    assert next(iter(whole.published)) == "baseline"
    assert {name: control for name in parents if (control := whole.control(name))} == {
        "phase1": "control1", "phase2": "control2", "lean": "control1",
    }  # fmt: skip
    assert [gain.stage for gain in gains([whole])] == ["lean", "phase1", "phase2"]


def test_what_was_trained_or_measured_on_other_images_is_no_control() -> None:
    root, control, phase1 = (stage(name, 0.013, 0.5, 32) for name in ("baseline", "control1", "phase1"))
    root = changed(root, parent=None)
    assert chain(0.013, 0, root, control, phase1).control("phase1") == "control1"
    others = DataSet("others", "/others", "1" * 64, 1, 1000)
    assert chain(0.013, 0, root, changed(control, train_images=others), phase1).control("phase1") is None


def test_gains_are_paired_by_seed(made: list[ChainRecord]) -> None:
    found = {(gain.stage, gain.lmbda): gain for gain in gains(made)}
    assert set(found) == {("phase4", 0.0018), ("phase4", 0.013)}
    gain = found["phase4", 0.013]
    assert gain.control == "control4"
    assert gain.rate_percent == Spread(pytest.approx(-6), pytest.approx(math.sqrt(2)), 2)
    assert found["phase4", 0.0018].rate_percent == Spread(pytest.approx(-5), None, 1)


def test_the_tables_have_error_bars(made: list[ChainRecord]) -> None:
    rows = [(row[0], row[1], row[2], row[3], row[5]) for row in gains_table(gains(made)).rows]
    assert rows == [
        ("0.0018", "phase4", "control4", "1", "-5.00"),
        ("0.013", "phase4", "control4", "2", "-6.00 ± 1.41"),
    ]
    assert quality_table(made).rows[-1][1:5:3] == ("phase4", "0.4793 ± 0.0061")


def test_rate_is_along_the_controls_curve() -> None:
    chains = [
        chain(lmbda, 0, stage("baseline", lmbda, 1, 20, None), stage("control1", lmbda, bpp, psnr),
              stage("phase1", lmbda, bpp - 0.02, psnr - 0.4))
        for lmbda, bpp, psnr in ((0.0018, 0.2, 28.0), (0.013, 0.4, 32.0))
    ]  # fmt: skip
    # At 20 dB a bit, 0.4 dB are worth 0.02 bits.
    assert [gain.rate_percent.mean for gain in gains(chains) if gain.rate_percent] == pytest.approx([0, 0], abs=1e-9)


def test_with_one_lmbda_the_loss_gives_the_slope(made: list[ChainRecord]) -> None:
    lmbda, step = 0.0018, 0.001
    # A stage with the same loss as its control, at a slightly lower rate.
    mse = 10**-2.8 + step / (lmbda * 255**2)
    equal = stage("phase4", lmbda, 0.2 - step, -10 * math.log10(mse))
    (gain,) = gains([chain(lmbda, 0, *made[0].stages[:2], equal)])
    assert gain.loss.mean == pytest.approx(0)
    assert gain.rate_percent.mean == pytest.approx(0, abs=0.01)


def test_what_is_far_from_its_control_has_no_rate_at_its_psnr() -> None:
    alone = [chain(0.013, 0, stage("baseline", 0.013, 0.5, 32, None), stage("control1", 0.013, 0.5, 30),
                   stage("phase1", 0.013, 0.4, 32))]  # fmt: skip
    (gain,) = gains(alone)
    assert gain.loss.mean < 0
    assert gain.rate_percent is None


def test_gains_are_drawn_by_stage_and_lmbda(made: list[ChainRecord]) -> None:
    (axis,) = figures.gains(gains(made)).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["phase4"]
    points = {bars.get_label(): bars.lines[0].get_xdata() for bars in axis.containers}
    assert points.keys() == {"λ = 0.0018", "λ = 0.013"}
    assert points["λ = 0.013"] == pytest.approx([-6])


def test_the_frontier_shows_rate_against_multiplications() -> None:
    stages = [stage("baseline", 0.013, 0.55, 32, None, 30), stage("control", 0.013, 0.5, 32, kmacs=30)]
    stages += [stage("lean", 0.013, 0.51, 32, kmacs=18), stage("phase4", 0.013, 0.49, 32, kmacs=45)]
    made = chain(0.013, 0, *stages)
    (axis,) = figures.frontier(made, gains([made])).axes
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist()[0] for bars in axis.containers}
    assert drawn == {"lean": pytest.approx([0.6, 2]), "phase4": pytest.approx([1.5, -2])}
