"""Rate–distortion curves, the differences between them, and the sweep that makes them."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from mini import FOLDER, STAGES, Notes
from typer.testing import CliRunner

from pipeline.chain.chain import Chain, ChainError
from pipeline.chain.lambda_sweep import StartingPoint, Sweep
from pipeline.commands.main import app
from pipeline.common import fault_injection as faults
from pipeline.common.errors import Interrupted
from pipeline.evidence.rate_distortion import (
    KODAK_NAMES,
    PUBLISHED,
    Curve,
    Point,
    curves,
    delta,
    deltas_table,
    draw,
    is_kodak,
)
from pipeline.tracking.records import Records
from pipeline.weights.checkpoints import read
from pipeline.weights.published import Quality

LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)


def published(rate: float = 1.0, gain_db: float = 0.0, count: int = 6) -> Curve:
    """The published curve with its rates scaled and its PSNR raised."""
    points = list(zip(LMBDAS, PUBLISHED, strict=True))[:count]
    return [Point(lmbda, Quality(bpp * rate, psnr + gain_db, None, 0.0), 1) for lmbda, (bpp, psnr) in points]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_rate_scaled_everywhere_is_the_bd_rate(count: int) -> None:
    found = delta(published(0.9, count=count), published(count=count), "baseline")
    assert found.bd_rate == pytest.approx(-10, abs=1e-6)
    assert found.bd_psnr is not None
    assert found.bd_psnr > 0
    assert found.points == count
    assert found.bd_rate_ms_ssim is None


def test_a_psnr_raised_everywhere_is_the_bd_psnr() -> None:
    found = delta(published(gain_db=0.3), published(), "baseline")
    assert found.bd_psnr == pytest.approx(0.3, abs=1e-6)
    assert found.bd_rate is not None
    assert found.bd_rate < 0


def test_only_lambdas_that_both_have_count() -> None:
    assert delta(published(0.9), published(count=3), "baseline").points == 3
    with pytest.raises(ValueError, match="1 λ in common with control4; a curve needs two or more"):
        delta(published(), published(count=1), "control4")


def test_curves_that_do_not_overlap_or_fold_back_give_no_figure() -> None:
    assert delta(published(gain_db=20), published(), "baseline").bd_rate is None
    folded = published()
    folded[2] = folded[4]
    assert delta(folded, published(), "baseline").bd_rate is None


def test_too_few_points_are_told_in_the_table() -> None:
    table = deltas_table({"baseline": published(count=1), "phase1": published(count=1)}, {"phase1": "baseline"})
    assert table.rows == [("phase1", "1 λ in common with baseline; a curve needs two or more", "–", "–", "–", "–")]


def test_kodak_is_known_by_its_names() -> None:
    names = [f"kodak/{name}.png" for name in sorted(KODAK_NAMES)]
    assert is_kodak(names)
    assert not is_kodak(names[:-1])
    assert not is_kodak([*names[:-1], "other.png"])
    for kodak in (False, True):
        labels = [line.get_label() for line in draw({"baseline": published()}, kodak).axes[0].lines]
        assert ("HPCM-Base, published" in labels) == kodak


LONG = 0.05000001


def sweep(runs: Path, *more: str) -> list[str]:
    """The command line of a sweep over two λ, one with more digits than its folder's name."""
    points = ["--lmbda", "0.013", "--lmbda", str(LONG)]
    return ["rd-curve", "phase1", "--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway", *points, *more]


def words(output: str) -> str:
    """What was printed, with single spaces."""
    return " ".join(output.split())


def test_a_sweep_takes_up_what_is_there_and_draws(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished[0].runs, runs)
    done = CliRunner().invoke(app, sweep(runs, "--plan"))
    assert done.exit_code == 0, done.output
    for row in ("stage 0.013 0.05", "baseline done –", "phase1 done –", "steps left – 19"):
        assert row in words(done.output)
    assert not (runs / "mini" / "lmbda-0.05").exists()

    before = (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns
    done = CliRunner().invoke(app, sweep(runs))
    assert done.exit_code == 0, done.output
    assert (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert (runs / "mini" / "rate-distortion.png").is_file()
    found = curves(Records(runs).chains())
    assert list(found) == STAGES
    assert [point.lmbda for point in found["phase1"]] == [0.013, LONG]
    assert "phase1 done done steps left – –" in words(CliRunner().invoke(app, sweep(runs, "--plan")).output)


def test_a_signal_during_publication_stops_the_sweep(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCM_FAULT", "publish.record:1")
    monkeypatch.setenv("HPCM_FAULT_SIGNAL", str(int(signal.SIGTERM)))
    command = sweep(runs)
    command[1] = "baseline"
    monkeypatch.setattr(faults, "_passed", Counter())
    stopped = CliRunner().invoke(app, command)
    assert isinstance(stopped.exception, Interrupted)
    assert [path.name for path in (runs / "mini").iterdir()] == ["lmbda-0.013"]


def test_one_codec_is_not_of_several_lambdas(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    file = finished[0].tasks[0].checkpoint
    wanted = Sweep(str(FOLDER), (), ("phase1",), (0.013, 0.05), tmp_path, baseline=file)
    with pytest.raises(ChainError, match=r"checkpoint.safetensors: a codec has one λ, but the sweep has 2; .* --from"):
        wanted.table()


def test_later_points_start_from_a_neighbour(runs: Path, tmp_path: Path) -> None:
    options = ["--from", str(LONG), "--from-set", "baseline.schedule.scratch.steps=0"]
    command = [*sweep(runs, *options)]
    command[1] = "baseline"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    first, second = (
        read(runs / "mini" / f"lmbda-{lmbda}" / "baseline" / "checkpoint.safetensors") for lmbda in (LONG, 0.013)
    )
    assert first.metadata["digest"] == second.metadata["digest"]  # not a step was trained
    assert "start" in second.metadata["inputs"]
    assert "start" not in first.metadata["inputs"]
    assert "done" in CliRunner().invoke(app, [*command, "--plan"]).output
    file = runs / "mini" / "lmbda-0.013" / "baseline" / "checkpoint.safetensors"
    taken = Sweep(str(FOLDER), (), ("baseline",), (0.013, 0.05), tmp_path, StartingPoint(0.05), file)
    assert [
        (chain.tasks[0].imported, chain.tasks[0].start is None) for point in taken.points() for chain in point.chains
    ] == [
        (file, True),
        (None, False),
    ]
    nowhere = Sweep(str(FOLDER), (), ("baseline",), (0.013,), runs, StartingPoint(0.1))
    with pytest.raises(ChainError, match="of --from is not in the sweep"):
        nowhere.table()
