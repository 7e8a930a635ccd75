"""A sweep on a real SLURM of two nodes, whose jobs reach their time limit again and again."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mini import ENVIRONMENT, FOLDER
from slurm import cluster, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(bool(missing()), reason="needs apt-get install slurmctld slurmd slurm-client munge"),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
]

ROOT = Path(__file__).parents[3]
STEPS = ["baseline.schedule.scratch.steps=600", "phase1.schedule.unfrozen.steps=300", "checkpoint_every=50"]
POINTS = ["--lmbda", "0.013", "--lmbda", "0.05", "--seed", "0", "--seed", "1"]
SLURM = ["--submit", "slurm", "--gpus", "0"]


def rd_curve(runs: Path, environment: dict[str, str], *more: str) -> str:
    """What `hpcm rd-curve` prints."""
    settings = [part for setting in STEPS for part in ("--set", setting)]
    options = ["--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway", *settings, *POINTS, *more]
    command = [sys.executable, "-m", "pipeline", "rd-curve", "phase1", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def states(runs: Path, environment: dict[str, str]) -> list[str]:
    """The states in the table of jobs."""
    table = rd_curve(runs, environment, "--plan").split("jobs\n")[1]
    print(table, flush=True)
    return [line.split("  ")[2].strip() for line in re.sub(" {2,}", "  ", table).splitlines()[1:]]


def wait_until(ready, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(5)


def test_a_sweep_of_requeued_and_cancelled_jobs_gives_the_same_bytes(tmp_path: Path) -> None:
    runs, reference = tmp_path / "jobs", tmp_path / "reference"
    with cluster(tmp_path / "slurm") as found:
        environment = {**ENVIRONMENT, **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
        submitted = rd_curve(runs, environment, *SLURM, "--time", "0:01")
        assert re.findall(r"job 1_(\d)", submitted) == ["0", "1", "2", "3"]  # one array
        assert rd_curve(runs, environment, *SLURM, "--time", "0:01").count("already (job 1_") == 4

        def each_requeued_twice() -> bool:
            states(runs, environment)
            logs = [log.read_text() for log in runs.glob("mini/*/logs/*.log")]
            return len(logs) == 4 and all(log.count("stopped by SIGUSR1; saved") >= 2 for log in logs)

        wait_until(each_requeued_twice, 1800)
        subprocess.run(["scancel", "1"], env=environment, check=True)
        wait_until(lambda: all(state.startswith("stopped at step") for state in states(runs, environment)), 120)
        assert "at step 0 of" not in "".join(states(runs, environment))
        rd_curve(runs, environment, *SLURM, "--time", "1:00")
        wait_until(lambda: states(runs, environment) == ["done"] * 4, 2400)
    rd_curve(reference, ENVIRONMENT)
    checkpoints = sorted(path.relative_to(reference) for path in reference.glob("mini/*/*/checkpoint.safetensors"))
    assert len(checkpoints) == 8
    assert [path for path in checkpoints if (runs / path).read_bytes() != (reference / path).read_bytes()] == []


def test_others_wait_for_the_baseline_that_they_start_from(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm") as found:
        environment = {**ENVIRONMENT, **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
        more = ["--from", "0.013", *SLURM, "--time", "0:30", "--set", "baseline.schedule.scratch.steps=9"]
        submitted = rd_curve(tmp_path / "runs", environment, *more)
        assert "0.013 seed 0 baseline: job 1;" in submitted
        shown = subprocess.run(
            ["squeue", "--noheader", "--array", "--format", "%i %E"], env=environment, capture_output=True, text=True
        ).stdout
        waits = dict(line.split(" ", 1) for line in shown.splitlines())
        assert {job: wait for job, wait in waits.items() if "_" in job}.keys() == {"3_0", "3_1", "4_0", "4_1"}
        assert all("afterok:1" in waits[job] for job in ("3_0", "3_1"))
        assert all("afterok:2" in waits[job] for job in ("4_0", "4_1"))
        subprocess.run(["scancel", "1"], env=environment, check=True)
        wait_until(lambda: "queued" not in " ".join(states(tmp_path / "runs", environment)[2:]), 120)
