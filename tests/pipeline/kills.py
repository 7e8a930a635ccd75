"""Runs the mini chain in processes that are killed, and checks what they leave.

Processes are forked from one that has imported everything, so that an attempt spends no time on imports.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import torch
from mini import FOLDER
from mlflow import MlflowClient
from mlflow.entities import Run

from modules import Noise
from pipeline.chain.chain import Chain
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import EXPERIMENT, Store
from pipeline.tracking.tags import KEY
from pipeline.training.objectives import RateDistortion
from pipeline.weights.published import PublicationRecord

KILLED = -9


def attempt(
    runs: Path,
    stage: str,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Process:
    """Start a process of `hpcm run` with the mini recipe; HPCM_FAULT in its environment says where it dies.

    What it prints goes to the file that LOG names; it works in the folder FOLDER; with DOUBLE it computes in float64,
    with POISON a loss is NaN.
    """
    command = ["hpcm", "run", stage, "--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway", "--yes", *options]
    command += [part for setting in settings for part in ("--set", setting)]
    process = _forkserver().Process(target=_run, args=(command, dict(environment or {})))
    process.start()
    return process


def attempts(
    runs: Path, stage: str, settings: Sequence[str], environments: Sequence[Mapping[str, str]]
) -> list[Process]:
    """Start one process for each environment. They train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(len(environments)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        attempt(runs, stage, settings, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment})
        for rank, environment in enumerate(environments)
    ]


def delivery(outbox: Path, runs: Path, environment: Mapping[str, str]) -> Process:
    """Start a process that sends an outbox's entries to the store of a folder of runs."""
    process = _forkserver().Process(target=_deliver, args=(outbox, runs, dict(environment)))
    process.start()
    return process


def _deliver(outbox: Path, runs: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    Outbox(outbox, Store.default(runs)).close(60)


def _forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    context.set_forkserver_preload(["kills"])
    return context


def exit_code(process: Process, timeout: float = 240) -> int:
    """Wait for the end of a process. Raises an error if it hangs."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    from pipeline.commands.main import main

    os.environ.update({"ACCELERATE_USE_CPU": "true", "LOG": os.devnull, **environment})
    log = os.open(os.environ["LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "FOLDER" in os.environ:
        os.chdir(os.environ["FOLDER"])
    if "DOUBLE" in os.environ:
        _compute_in_double()
    if "POISON" in os.environ:
        _poison(int(os.environ["POISON"]))
    sys.argv = command
    main()


def _compute_in_double() -> None:
    """Train in float64, where the order of a sum almost never changes how a latent is rounded."""
    from pipeline.data import crops as data

    in_single = data._to_tensor
    data._to_tensor = lambda image: in_single(image).double()
    torch.set_default_dtype(torch.float64)


def _poison(step: int) -> None:
    """Make the loss of a step NaN, in this process alone."""
    forward, calls = RateDistortion.forward, iter(range(1, 10**6))

    def spoilt(self: RateDistortion, images: torch.Tensor, noise: Noise) -> dict[str, torch.Tensor]:
        values = forward(self, images, noise)
        return {**values, "loss": values["loss"] * (float("nan") if next(calls) == step else 1.0)}

    RateDistortion.forward = spoilt  # type: ignore[method-assign]


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
    """Steps and values of each metric, in the order of their steps. A step that was logged twice is listed twice."""
    return {
        key: sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if not key.endswith("seconds") and not key.startswith("system/")
    }


def differences(chain: Chain, reference: Chain, rebuilt: bool = False) -> list[str]:
    """The differences of a chain from an uninterrupted one: bytes, number of runs, metrics, leftovers.

    Of a chain that was partly `rebuilt` each stage may have several runs; that of what is published counts.
    """
    found: list[str] = []
    (client, runs), (other_client, other_runs) = stage_runs(chain), stage_runs(reference)
    for task, other in zip(chain.tasks, reference.tasks, strict=False):
        name = task.stage.name
        if task.checkpoint.read_bytes() != other.checkpoint.read_bytes():
            found.append(f"{name}: other bytes")
        key = PublicationRecord.read(task.record).mlflow_key
        own = [run for run in runs[name] if run.data.tags[KEY] == key]
        counted = own if rebuilt else runs[name]
        if len(counted) != 1 or counted[0].info.status != "FINISHED":
            found.append(f"{name}: runs {[run.info.status for run in counted]}")
        elif history(client, counted[0]) != history(other_client, other_runs[name][0]):
            found.append(f"{name}: other metrics")
        versions = client.search_model_versions(f"run_id = '{counted[0].info.run_id}'") if counted else []
        if [version.tags.get("hpcm.stage") for version in versions] != [name]:
            found.append(f"{name}: {len(versions)} registered versions")
        if {path.name for path in task.folder.iterdir()} != {path.name for path in other.folder.iterdir()}:
            found.append(f"{name}: other files")
    if (chain.folder / "outbox").exists():
        found.append("outbox not empty")
    return found
