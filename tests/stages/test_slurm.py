"""`stages/slurm.sbatch` on a real SLURM cluster of two nodes. Its jobs reach their time limit."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini import ENVIRONMENT, FOLDER, hpcm, mini_chain
from slurm import cluster, missing

from pipeline.chain.measuring import measure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason="needs apt-get install slurmctld slurmd slurm-client munge"),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
]

ROOT = Path(__file__).parents[2]
SECONDS = 150
"""Time of a chain's steps on this machine. A job with a limit of two minutes is told to save after 60 to 100 s."""
SAVED = "stopped by SIGUSR1; saved"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of SLURM's commands and of jobs, whose `hpcm` is that of this Python."""
    with cluster(tmp_path / "slurm") as found:
        path = os.pathsep.join([str(Path(sys.executable).parent), found["PATH"]])
        of_slurm = {"PATH": path, "SLURM_CONF": found["SLURM_CONF"]}
        yield {**ENVIRONMENT, **of_slurm, "PYTHONPATH": str(ROOT), "LMBDAS": "0.013 0.05"}


def slurm(environment: dict[str, str], *command: object) -> str:
    """The output of a SLURM command."""
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def submit(environment: dict[str, str], runs: Path, limit: str, array: str, *arguments: str) -> str:
    """Submit an array of jobs with one process each and no GPU. Returns its number."""
    options = ["--array", array, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--time={limit}"]
    options += ["--signal=B:USR1@30", f"--output={runs}-%a.log"]
    of_hpcm = [*arguments, "--recipe", FOLDER, "--runs", runs, "--accept-anyway"]
    printed = slurm(environment, "sbatch", *options, ROOT / "stages" / "slurm.sbatch", *of_hpcm)
    (number,) = re.findall(r"\d+", printed)
    return number


def wait_until(ready: Callable[[], bool], seconds: float, pause: float = 2.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(pause)


def checkpoints(runs: Path) -> dict[str, bytes]:
    """The bytes of the published checkpoints, by λ and stage."""
    found = runs.glob("mini/*/*/checkpoint.safetensors")
    return {path.parent.relative_to(runs).as_posix(): path.read_bytes() for path in found}


def test_jobs_that_are_requeued_cancelled_and_submitted_again_give_the_same_bytes(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (cost,) = measure(mini_chain(tmp_path / "measured", "baseline").plan(), 1, print).segments
    assert cost.cost is not None
    steps = int(SECONDS / cost.cost.step_seconds)
    print(f"{cost.cost.step_seconds:.3f} s a step: {steps} steps", flush=True)
    settings = ["--set", f"baseline.schedule.scratch.steps={steps}", "--set", "checkpoint_every=50"]
    runs, logs = tmp_path / "jobs", [tmp_path / f"jobs-{number}.log" for number in (0, 1)]

    def text() -> list[str]:
        return [log.read_text() if log.exists() else "" for log in logs]

    first = submit(environment, runs, "0:02:00", "0-1", "phase1", *settings)

    def saved_and_resumed() -> bool:
        assert not any("result: " in log for log in text()), "a job ended before its limit: give SECONDS more"
        return all(SAVED in log and "resumed in scratch at step" in log for log in text())

    wait_until(saved_and_resumed, 900)
    slurm(environment, "scancel", first)
    wait_until(lambda: not slurm(environment, "squeue", "--noheader"), 120)
    assert all("stopped by SIGTERM; saved" in log for log in text())
    assert checkpoints(runs) == {}

    submit(environment, runs, "1:00:00", "0-1", "phase1", *settings)
    points = ["--lmbda", "0.013", "--lmbda", "0.05", "--runs", tmp_path / "reference", "--accept-anyway"]
    reference = hpcm("rd-curve", "phase1", "--recipe", FOLDER, *points, *settings)
    subprocess.run(reference, cwd=ROOT, env=environment, check=True)
    wait_until(lambda: not slurm(environment, "squeue", "--noheader"), 1800)
    assert len(checkpoints(runs)) == 4
    assert checkpoints(runs) == checkpoints(tmp_path / "reference")


@pytest.mark.parametrize("seconds", [0, 0.02, 0.1, 0.5, 2])
def test_a_job_that_is_warned_while_it_starts_is_queued_again(
    environment: dict[str, str], tmp_path: Path, seconds: float
) -> None:
    job = submit(
        environment, tmp_path / "runs", "1:00:00", "0", "baseline", "--set", "baseline.schedule.scratch.steps=9999"
    )

    def starts() -> bool:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return any(b"srun" in line and os.fsencode(tmp_path) in line for line in lines)

    wait_until(starts, 60, 0.005)
    time.sleep(seconds)
    slurm(environment, "scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: "Restarts=0" not in slurm(environment, "scontrol", "show", "job", job), 130, 0.5)
    assert "Restarts=1" in slurm(environment, "scontrol", "show", "job", job)
