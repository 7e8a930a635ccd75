"""`hpcm plan --measure` estimates the time and memory of a chain, and the audit compares them afterwards."""

from pathlib import Path

import pytest
from mini import FOLDER, PHOTOS, Hpcm, mini_chain, run_chain

from pipeline.chain import measuring
from pipeline.evidence.audit import audit, tables
from pipeline.recipes.schema import Stage
from pipeline.training import trial
from pipeline.training.estimate import Estimate, SegmentEstimate, StepCost

OPTIONS = ["--recipe", FOLDER, "--val", PHOTOS, "--measure", "--set", "data.batch_size=4"]


def segment(batch: float, workers: int = 0, warm: float = 0.0) -> SegmentEstimate:
    return SegmentEstimate("phase1", "frozen", 100, 40, 8, workers, StepCost(1.0, 2.0, batch, 10**9, None, warm))


def test_times_of_a_segment() -> None:
    assert segment(0.5).seconds(loading=False) == 60 * 1.0 + 40 * 2.0
    assert segment(0.5).seconds() == 60 * 1.5 + 40 * 2.5
    assert segment(0.5).seconds(50) == 50 * 1.5
    assert segment(0.5, warm=7.0).seconds(90) == 7.0 + 10 * 1.5
    assert [segment(batch, workers=2).pace for batch in (0.5, 3.0)] == [1.0, 3.0]
    assert [segment(batch).limit for batch in (0.5, 3.0)] == ["device", "loader"]


def test_a_plan_is_measured_kept_and_compared_with_what_came(
    runs: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setattr(measuring, "in_fresh_process", lambda call, *arguments: call(*arguments))
    monkeypatch.setattr(trial, "PLANNED", trial.Limits(warm=1, least=1, seconds=0.0))
    shown = hpcm("rd-curve", "phase1", *OPTIONS, "--lmbda", 0.013, "--lmbda", 0.05, "--runs", runs).out
    for word in ("device", "process GB", "baseline  scratch", "phase1    unfrozen", "phase1    evaluation", "sweep"):
        assert word in shown
    chain = mini_chain(runs, "baseline", ["data.batch_size=4"])
    assert [path.name for path in chain.folder.iterdir()] == ["estimate.json"]  # nothing was trained
    estimate = Estimate.read(chain.folder)
    assert [(found.stage, found.segment) for found in estimate.segments] == [
        ("baseline", "scratch"),
        *(("phase1", name) for name in ("align", "frozen", "unfrozen")),
    ]
    assert all(found.cost.step_seconds > 0 < found.cost.batch_seconds for found in estimate.segments)
    differ = [found.segment for found in estimate.segments if found.cost.handover_seconds != found.cost.step_seconds]
    assert differ == ["frozen"]

    run_chain(chain)
    (audited,), _ = audit(runs)
    assert audited.stages[0].expected == {"scratch": estimate.segments[0].seconds(loading=False)}
    assert "% of the estimate" in list(tables(audited))[1].plain()


def test_what_does_not_fit_is_said_with_the_least_change_that_fits(
    runs: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    tried: list[tuple[bool, int]] = []

    def fits_at_one(call: object, asked: trial.Trial, photos: object) -> tuple[str, StepCost] | None:
        if call is trial.try_evaluation:
            return None
        stage: Stage = asked.stage
        tried.append((stage.gradient_checkpointing, stage.data.batch_size))
        fits = stage.name == "baseline" or (stage.gradient_checkpointing and stage.data.batch_size == 1)
        return ("a small GPU", StepCost(1.0, 1.0, 0.1, 10**9, 10**9)) if fits else None

    monkeypatch.setattr(measuring, "in_fresh_process", fits_at_one)
    shown = hpcm("plan", "phase1", *OPTIONS, "--runs", runs, code=1)
    change = "phase1.gradient_checkpointing=true and phase1.data.accumulate=4 (1 crops at a time)"
    assert f"phase1, align: fits with {change}" in shown.err
    assert "phase1, evaluation: use smaller validation images" in shown.err
    assert tried[:5] == [(False, 4), (False, 4), (True, 4), (True, 2), (True, 1)]
    assert "does not fit" in shown.out
