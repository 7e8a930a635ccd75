"""`hpcm rd-curve`: a sweep over λ, with a chain for each."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from mini import FOLDER, STAGES, Notes, one_image
from typer.testing import CliRunner

from pipeline.chain.chain import Chain
from pipeline.commands.main import app
from pipeline.common import fault_injection as faults
from pipeline.common.errors import Interrupted
from pipeline.evidence.rate_distortion import curves
from pipeline.records.chains import read_chains

LONG = 0.05000001


def sweep(runs: Path, target: str, *more: str) -> list[str]:
    """The command line of a sweep over two λ, one with more digits than its folder's name."""
    points = ["--lmbda", "0.013", "--lmbda", str(LONG)]
    images = [word for setting in one_image(runs.parent / "val") for word in ("--set", setting)]
    command = ["rd-curve", target, "--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway"]
    return [*command, *points, *images, *more]


def words(output: str) -> str:
    """What was printed, with single spaces."""
    return " ".join(output.split())


def test_a_sweep_takes_up_what_is_there_and_draws(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished[0].runs, runs)
    done = CliRunner().invoke(app, sweep(runs, "phase1", "--plan"))
    assert done.exit_code == 0, done.output
    for row in ("stage 0.013 0.05", "baseline done –", "phase1 done –", "steps left – 19"):
        assert row in words(done.output)
    assert not (runs / "mini" / "lmbda-0.05").exists()

    before = (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns
    done = CliRunner().invoke(app, sweep(runs, "phase1"))
    assert done.exit_code == 0, done.output
    assert "no Bjøntegaard deltas: no stage has a control" in words(done.output)
    assert (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert (runs / "mini" / "rate-distortion.png").is_file()
    found = curves(read_chains(runs))
    assert sorted(found) == STAGES
    assert [point.lmbda for point in found["phase1"]] == [0.013, LONG]
    shown = CliRunner().invoke(app, sweep(runs, "phase1", "--plan")).output
    assert "phase1 done done steps left – –" in words(shown)


def test_a_signal_during_publication_stops_the_sweep(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCM_FAULT", "publish.record:1")
    monkeypatch.setenv("HPCM_FAULT_SIGNAL", str(int(signal.SIGTERM)))
    monkeypatch.setattr(faults, "_passed", Counter())
    stopped = CliRunner().invoke(app, sweep(runs, "baseline"))
    assert isinstance(stopped.exception, Interrupted)
    assert [path.name for path in (runs / "mini").iterdir()] == ["lmbda-0.013"]


def test_one_codec_is_not_of_several_lambdas(finished: tuple[Chain, Notes], runs: Path) -> None:
    done = CliRunner().invoke(app, sweep(runs, "phase1", "--baseline", str(finished[0].tasks[0].checkpoint)))
    assert "a codec has one λ, but the sweep has 2; give its λ" in str(done.exception)
