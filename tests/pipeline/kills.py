"""Runs of the mini chain in processes that die, and what is left of them at the end.

Processes are forked from one that has everything imported, so that an attempt costs what it does and no more.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mini import mini_chain, run_chain
from mlflow import MlflowClient
from mlflow.entities import Run

import pipeline.stage  # noqa: F401 (imported for the processes that are forked)
from pipeline.chain import Chain
from pipeline.interruption import Interrupted, Told
from pipeline.tracking import EXPERIMENT, Store

KILLED = -9


def attempt(
    runs: Path, stage: str, settings: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> multiprocessing.process.BaseProcess:
    """Start a process that runs the mini chain to a stage; HPCM_FAULT in its environment says where it dies."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    context.set_forkserver_preload(["kills"])
    process = context.Process(target=_run, args=(runs, stage, settings, dict(environment or {})))
    process.start()
    return process


def exit_code(process: multiprocessing.process.BaseProcess, timeout: float = 240) -> int:
    """Wait for the end of a process; one that hangs is an error."""
    process.join(timeout)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _run(runs: Path, stage: str, settings: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    try:
        run_chain(mini_chain(runs, stage, settings))
    except (Interrupted, Told) as stop:
        sys.exit(stop.exit_code)


def stage_runs(chain: Chain) -> tuple[MlflowClient, dict[str, list[Run]]]:
    """A client of the chain's store, and the runs of each stage."""
    client = Store.default(chain.runs).client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    found: dict[str, list[Run]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        if "hpcm.stage" in run.data.tags:
            found.setdefault(run.data.tags["hpcm.stage"], []).append(run)
    return client, found


def history(client: MlflowClient, run: Run) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each metric in the order of their steps; a step that is there twice is listed twice."""
    return {
        key: sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if not key.endswith("seconds")
    }


def differences(chain: Chain, reference: Chain) -> list[str]:
    """What of a chain is not as in one that was never touched: bytes, number of runs, metrics, leftovers."""
    found: list[str] = []
    (client, runs), (other_client, other_runs) = stage_runs(chain), stage_runs(reference)
    for job, other in zip(chain.jobs, reference.jobs, strict=False):
        name = job.stage.name
        if job.checkpoint.read_bytes() != other.checkpoint.read_bytes():
            found.append(f"{name}: other bytes")
        if len(runs[name]) != 1 or runs[name][0].info.status != "FINISHED":
            found.append(f"{name}: runs {[run.info.status for run in runs[name]]}")
        elif history(client, runs[name][0]) != history(other_client, other_runs[name][0]):
            found.append(f"{name}: other metrics")
        if {path.name for path in job.folder.iterdir()} != {path.name for path in other.folder.iterdir()}:
            found.append(f"{name}: other files")
    if (chain.folder / "outbox").exists():
        found.append("outbox not empty")
    return found
