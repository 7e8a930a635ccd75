"""Jobs on this machine, through submitit's local executor. SLURM itself is in `test_slurm.py`, which is slow."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counting import Counting, WarnedEarly
from mini import FOLDER, mini_chain, run_chain
from typer.testing import CliRunner

from pipeline.cluster import local_queue, resumable
from pipeline.cluster.local_queue import LocalQueue
from pipeline.cluster.records import ChainJobs, JobRecord, last_line, status_of
from pipeline.cluster.resources import ClusterError, Resources, minutes_of, places
from pipeline.cluster.submission import ChainJob
from pipeline.commands.confirmation import NotConfirmed
from pipeline.commands.main import app
from pipeline.common.errors import Interrupted


@pytest.fixture(autouse=True)
def two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the machine up for two jobs at a time, whose processes find the modules in this folder."""
    monkeypatch.setattr(local_queue, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(local_queue, "places", lambda gpus: [(), ()])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))


def job(folder: Path, work: Counting, *after: ChainJob) -> ChainJob:
    folder.mkdir(parents=True, exist_ok=True)
    return ChainJob(folder.name, folder, work, after)


def in_round(work: Counting, number: int, act: Callable[[int], None]) -> threading.Thread:
    """Act on the process of each of the first `number` rounds of a job, once it handles signals."""

    def watch() -> None:
        for index in range(number):
            while not work.rounds.exists() or len(work.rounds.read_text().splitlines()) <= index:
                time.sleep(0.02)
            act(int(work.rounds.read_text().splitlines()[index]))

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def reach_the_limit(process: int) -> None:
    """Send the signal that announces the time limit."""
    os.kill(process, signal.SIGUSR1)


def queue(lines: list[str]) -> LocalQueue:
    def done(job: ChainJob) -> bool:
        assert isinstance(job.work, Counting)
        return int(job.work.progress()) == job.work.until

    return LocalQueue(Resources(gpus=0), lines.append, done)


def test_jobs_wait_and_say_why_they_fail(tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / "recipe" / name for name in "abcd")
    long = job(a, counting := Counting(a / "count", 50, 0.02))
    broken = job(b, Counting(b / "count", 5, fails="the disk is full"))
    after_long = job(c, Counting(c / "count", 1), long)
    never = job(d, Counting(d / "count", 1), broken)
    lines: list[str] = []
    watching = in_round(counting, 2, reach_the_limit)
    assert queue(lines).run([long, broken, after_long, never]) == [broken, never]
    watching.join()
    assert lines.index("a: done") < next(n for n, line in enumerate(lines) if line.startswith("c: started"))
    assert "b: failed: error: the disk is full" in lines
    assert "d: not started, because a job that must run before it failed" in lines
    log = (a / ChainJobs.read(a).jobs[0].log).read_text()
    assert log.count("stopped by SIGUSR1; saved") == 2
    assert (a / "count").read_text() == "50"
    assert status_of(a, {}).state == "ended"
    assert status_of(b, {}).last_line == "error: the disk is full"


def test_a_job_without_progress_is_not_resumed_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "recipe" / "a"
    idle = job(folder, work := Counting(folder / "count", 10**6, 0.02, idle=True))
    lines: list[str] = []
    watching = in_round(work, 3, reach_the_limit)
    assert queue(lines).run([idle]) == [idle]
    watching.join()
    assert "a: failed: error: 3 rounds brought no progress; give the job a longer --time" in lines
    assert len(work.rounds.read_text().splitlines()) == 3


def test_a_job_whose_time_limit_comes_before_it_has_started_is_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "recipe" / "a"
    early = job(folder, work := WarnedEarly(folder / "count", 1))
    lines: list[str] = []
    assert queue(lines).run([early]) == []
    assert lines[-1] == "a: done"
    assert work.warned.exists()
    assert len(work.rounds.read_text().splitlines()) == 1


def test_a_job_is_queued_again_once_the_controller_of_slurm_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(
        [subprocess.CalledProcessError(1, "scontrol"), subprocess.TimeoutExpired("scontrol", 60), SystemExit(0)]
    )

    def queue_again(*received: object) -> None:
        raise next(answers)

    monkeypatch.setattr(resumable, "_join_processes", lambda: None)
    monkeypatch.setattr(resumable, "PAUSE", 0.0)
    before = signal.signal(signal.SIGUSR1, queue_again)
    job = resumable.ResumableJob(work := Counting(tmp_path / "count", 10**6, 0.02))
    watching = in_round(work, 1, reach_the_limit)
    try:
        with pytest.raises(SystemExit):
            job()
    finally:
        watching.join()
        signal.signal(signal.SIGUSR1, before)
    assert next(answers, None) is None


def test_a_signal_stops_the_jobs_which_save(tmp_path: Path) -> None:
    folder = tmp_path / "recipe" / "a"
    counting = job(folder, work := Counting(folder / "count", 10**6, 0.02))

    def stop(process: int) -> None:
        assert status_of(folder, {}).state == "running"
        os.kill(os.getpid(), signal.SIGINT)

    lines: list[str] = []
    watching = in_round(work, 1, stop)
    with pytest.raises(Interrupted):
        queue(lines).run([counting])
    watching.join()
    assert lines[-1] == "a: stopped: stopped by SIGTERM; saved"
    assert int(work.progress()) > 0
    assert status_of(folder, {}).state == "ended"


def test_a_chain_as_a_job_gives_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    options = ["--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway"]
    submit = ["run", "baseline", *options, "--submit", "local", "--gpus", "0"]
    done = CliRunner().invoke(app, submit)
    assert done.exit_code == 0, done.output
    assert "baseline: done" in done.output
    here = mini_chain(tmp_path / "here", "baseline")
    here.runs.mkdir()
    shutil.copy(runs / "mlflow.db", here.runs)
    run_chain(here)
    there = mini_chain(runs, "baseline").tasks[0].checkpoint
    assert there.read_bytes() == here.tasks[0].checkpoint.read_bytes()
    shown = CliRunner().invoke(app, ["rd-curve", "baseline", *options, "--lmbda", "0.013", "--plan"]).output
    assert "done" in shown[shown.index("jobs") :]
    assert CliRunner().invoke(app, submit).output == "baseline: done\n"


def test_a_job_that_lacks_what_its_recipe_needs_is_asked_about_before_it_is_submitted(runs: Path) -> None:
    command = ["run", "baseline", "--recipe", str(FOLDER), "--runs", str(runs), "--set", "needs=[gpu, images]"]
    refused = CliRunner().invoke(app, [*command, "--submit", "local"])
    assert "is meant for a data set, and none is given" in refused.output
    assert "meant for a GPU" not in refused.output  # the job may find one
    assert isinstance(refused.exception, NotConfirmed)
    assert not list(runs.glob("**/jobs.json"))


def test_the_chains_that_start_from_another_wait_for_its_root(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[ChainJob] = []
    monkeypatch.setattr(LocalQueue, "run", lambda self, jobs: queued.extend(jobs) or [])
    options = ["--recipe", str(FOLDER), "--runs", str(runs), "--lmbda", "0.013", "--lmbda", "0.05", "--from", "0.013"]
    done = CliRunner().invoke(app, ["rd-curve", "phase1", *options, "--submit", "local"])
    assert done.exit_code == 0, done.output
    assert [job.title for job in queued] == ["0.013 baseline", "0.013", "0.05"]
    assert [job.after for job in queued] == [(), (queued[0],), (queued[0],)]


def test_what_slurm_says_of_a_job() -> None:
    job = JobRecord("slurm", "7_1")
    assert job.state({"7_1": "PENDING|Dependency"}) == ("queued", "Dependency")
    assert job.state({"7_1": "COMPLETING|None"}) == ("running", "")
    assert job.state({"7_2": "RUNNING|None"}) == ("ended", "")


def test_the_last_line_is_the_jobs_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: no such file\nsubmitit INFO (now) - x\nsrun: error: node1: task 0: Exited\n\n")
    assert last_line(log) == "error: no such file"
    log.write_text("srun: error: node1: task 0: User defined signal 1\n")
    assert last_line(log) == "srun: error: node1: task 0: User defined signal 1"


def test_times_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert minutes_of("12:00") == 720
    assert minutes_of("1-00:30") == 1470
    for wrong in ("12", "0:00", "1h"):
        with pytest.raises(ClusterError, match="--time"):
            minutes_of(wrong)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert places(0) == [()] * 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert places(0) == [()]
    monkeypatch.setattr("pipeline.cluster.resources._visible_gpus", lambda: [4, 5, 6, 7, 8])
    assert places(2) == [(4, 5), (6, 7)]
    assert len(places(None)) == 5
    with pytest.raises(ClusterError, match="finds only 5"):
        places(8)
