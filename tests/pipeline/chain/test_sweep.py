"""`hpcm rd-curve`: a sweep over λ, with a chain for each."""

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from mini import FOLDER, PHOTOS, STAGES, Finished, Hpcm

from pipeline.common import fault_injection as faults
from pipeline.evidence.rate_distortion import curves
from pipeline.records.chains import read_chains
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.published import Lineage

LONG = 0.05000001
"""A λ with more digits than its folder's name."""
SWEEP = ["--recipe", FOLDER, "--val", PHOTOS, "--lmbda", 0.013, "--lmbda", LONG, "--accept-anyway"]


@pytest.fixture
def runs(stored_runs: Path) -> Path:
    """A folder of runs with an empty store."""
    return stored_runs


def words(output: str) -> str:
    """What was printed, with single spaces."""
    return " ".join(output.split())


def test_a_sweep_takes_up_what_is_there_and_draws(finished: Finished, runs: Path, hpcm: Hpcm) -> None:
    shutil.copytree(finished[0].runs, runs, dirs_exist_ok=True)
    command = ["rd-curve", "phase1", *SWEEP, "--runs", runs]
    planned = words(hpcm(*command, "--plan").out)
    for row in ("stage 0.013 0.05", "baseline done –", "phase1 done –", "steps left – 19"):
        assert row in planned
    assert not (runs / "mini" / "lmbda-0.05").exists()

    before = (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns
    assert "no Bjøntegaard deltas: no stage has a control" in words(hpcm(*command).out)
    assert (runs / "mini" / "lmbda-0.013" / "phase1" / "checkpoint.safetensors").stat().st_mtime_ns == before
    assert (runs / "mini" / "rate-distortion.png").is_file()
    found = curves(read_chains(runs))
    assert sorted(found) == STAGES
    assert [point.lmbda for point in found["phase1"]] == [0.013, LONG]
    assert "phase1 done done steps left – –" in words(hpcm(*command, "--plan").out)


def test_a_signal_during_publication_stops_the_sweep(runs: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm) -> None:
    monkeypatch.setenv("HPCM_FAULT", "publish.record:1")
    monkeypatch.setenv("HPCM_FAULT_SIGNAL", str(int(signal.SIGTERM)))
    monkeypatch.setattr(faults, "_passed", Counter())
    hpcm("rd-curve", "baseline", *SWEEP, "--runs", runs, code=143)
    assert [path.name for path in (runs / "mini").iterdir()] == ["lmbda-0.013"]


def test_without_lambdas_those_of_the_official_codecs_for_the_metric_are_taken(tmp_path: Path, hpcm: Hpcm) -> None:
    planned = words(hpcm("rd-curve", "--recipe", "ms-ssim", "--runs", tmp_path, "--plan").out)
    assert "stage 2.4 4.58 8.73 16.64 31.73 60.5" in planned


def test_each_lambda_has_a_baseline_of_its_own(finished: Finished, runs: Path, tmp_path: Path, hpcm: Hpcm) -> None:
    first, second = finished[0].tasks[0].checkpoint, tmp_path / "second.safetensors"
    publish(second, load_codec(first), Lineage(lmbda=LONG, metric="mse"))
    command = ["rd-curve", "baseline", "--recipe", FOLDER, "--val", PHOTOS, "--runs", runs, "--baseline", first]
    assert "stage 0.013 0.05000001 baseline – – steps left – –" in words(
        hpcm(*command, "--baseline", second, "--plan").out
    )
    for wrong in (["--baseline", first], ["--lmbda", 0.013, "--lmbda", LONG]):
        assert "those given are for λ = 0.013" in hpcm(*command, *wrong, code=1).err
