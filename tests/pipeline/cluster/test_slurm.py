"""A sweep on a real SLURM cluster of two nodes. Its jobs reach their time limit several times."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mini import ENVIRONMENT, FOLDER, mini_chain
from slurm import cluster, missing

from pipeline.chain.measuring import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(bool(missing()), reason="needs apt-get install slurmctld slurmd slurm-client munge"),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
]

ROOT = Path(__file__).parents[3]
SECONDS = 240
"""Time of a chain's steps on this machine. A job with a limit of two minutes is told to save after 70 to 100 s."""
POINTS = ["--lmbda", "0.013", "--lmbda", "0.05", "--seed", "0", "--seed", "1"]
SLURM = ["--submit", "slurm", "--gpus", "0"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a chain that trains for about SECONDS."""
    (cost,) = measure(mini_chain(tmp_path_factory.mktemp("measured"), "baseline").plan(), 1, print).segments
    assert cost.cost is not None
    count = int(SECONDS / cost.cost.step_seconds)
    print(f"{cost.cost.step_seconds:.3f} s a step: {count} steps")
    lengths = {"baseline.schedule.scratch": 2 * count // 3, "phase1.schedule.unfrozen": count // 3}
    return [part for name, length in lengths.items() for part in ("--set", f"{name}.steps={length}")]


def rd_curve(runs: Path, environment: dict[str, str], *more: str) -> str:
    """The output of `hpcm rd-curve`."""
    options = ["--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway", *POINTS, *more]
    command = [sys.executable, "-m", "pipeline", "rd-curve", "phase1", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def states(runs: Path, environment: dict[str, str], *more: str) -> list[str]:
    """The states in the table of jobs."""
    table = rd_curve(runs, environment, "--plan", *more).split("jobs\n")[1]
    print(table, flush=True)
    return [line.split("  ")[2].strip() for line in re.sub(" {2,}", "  ", table).splitlines()[1:]]


def wait_until(ready: Callable[[], bool], seconds: float, pause: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(pause)


def slurm(environment: dict[str, str], *command: str) -> str:
    """The output of a SLURM command."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def starts(runs: Path) -> bool:
    """Whether the Python of a job of these runs has started. It may not have imported anything yet."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return any(line.startswith(sys.executable.encode()) and os.fsencode(runs / "mini/jobs") in line for line in lines)


def test_a_sweep_of_requeued_and_cancelled_jobs_gives_the_same_bytes(tmp_path: Path, steps: list[str]) -> None:
    runs, reference = tmp_path / "jobs", tmp_path / "reference"
    more = [*steps, "--set", "checkpoint_every=50"]
    short, long = ([*more, *SLURM, "--time", limit] for limit in ("0:02", "1:00"))
    with cluster(tmp_path / "slurm") as found:
        environment = {**ENVIRONMENT, **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
        assert re.findall(r"job 1_(\d)", rd_curve(runs, environment, *short)) == ["0", "1", "2", "3"]  # one array
        assert rd_curve(runs, environment, *short).count("already (job 1_") == 4

        def each_requeued_twice() -> bool:
            assert "done" not in states(runs, environment, *more), "the time limit never came: give SECONDS more"
            logs = [log.read_text() for log in runs.glob("mini/*/logs/*.log") if log.exists()]
            return len(logs) == 4 and all(log.count("stopped by SIGUSR1; saved") >= 2 for log in logs)

        wait_until(each_requeued_twice, 1800)
        slurm(environment, "scancel", "1")
        stopped = re.compile(r"stopped at step [1-9]")
        wait_until(lambda: all(map(stopped.match, states(runs, environment, *more))), 120)
        rd_curve(runs, environment, *long)
        wait_until(lambda: states(runs, environment, *more) == ["done"] * 4, 2400)
    rd_curve(reference, ENVIRONMENT, *more)
    checkpoints = sorted(path.relative_to(reference) for path in reference.glob("mini/*/*/checkpoint.safetensors"))
    assert len(checkpoints) == 8
    assert [path for path in checkpoints if (runs / path).read_bytes() != (reference / path).read_bytes()] == []


def test_a_job_that_is_warned_while_python_starts_is_queued_again(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm") as found:
        environment = {**ENVIRONMENT, **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
        for number, seconds in enumerate((0, 0.01, 0.05, 0.2, 1), 1):
            runs = tmp_path / f"runs-{number}"
            options = ["--recipe", str(FOLDER), "--runs", str(runs), "--set", "baseline.schedule.scratch.steps=9999"]
            command = [sys.executable, "-m", "pipeline", "run", "baseline", *options, *SLURM, "--time", "1:00"]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            wait_until(lambda runs=runs: starts(runs), 60, 0.005)
            time.sleep(seconds)
            slurm(environment, "scancel", "--signal=USR1", str(number))
            job = ("scontrol", "show", "job", str(number))
            wait_until(lambda job=job: "Restarts=1" in slurm(environment, *job), 90, 0.5)
            slurm(environment, "scancel", str(number))


def test_others_wait_for_the_baseline_that_they_start_from(tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm") as found:
        environment = {**ENVIRONMENT, **{name: found[name] for name in ("PATH", "SLURM_CONF")}}
        more = ["--from", "0.013"]
        submitted = rd_curve(tmp_path / "runs", environment, *more, *SLURM, "--time", "0:30")
        jobs = dict(re.findall("(.+): job ([0-9_]+);", submitted))
        shown = slurm(environment, "squeue", "--noheader", "--array", "--format", "%i %E")
        waits = dict(line.split(" ", 1) for line in shown.splitlines())
        for seed in (0, 1):
            for lmbda in ("0.013", "0.05"):
                assert f"afterok:{jobs[f'0.013 seed {seed} baseline']}" in waits[jobs[f"{lmbda} seed {seed}"]]
        slurm(environment, "scancel", "1")
        wait_until(lambda: "queued" not in " ".join(states(tmp_path / "runs", environment, *more)), 120)
