"""Runs the mini chain in processes that are killed, and checks what they leave.

Processes are forked from one that has imported everything, so that an attempt spends no time on imports.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

import torch
from mini import FOLDER, SMALL, history, record_of

from modules import Noise
from pipeline.chain.chain import Chain
from pipeline.commands import running
from pipeline.commands.main import main
from pipeline.training.objectives import RateDistortion
from pipeline.training.trainer import Trainer
from pipeline.weights.training_state import TrainingState

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
    with POISON a loss is NaN, with DRIFT its weights start a little off. Without MIRROR nothing is sent to MLflow.
    """
    command = ["hpcm", "run", stage, "--recipe", str(FOLDER), "--runs", str(runs), "--accept-anyway", "--yes", *options]
    command += [part for setting in [*SMALL, *settings] for part in ("--set", setting)]
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
    if "MIRROR" not in environment:  # A database for each folder would take longer than the attempts.
        running.live_mirror = lambda *arguments: nullcontext()  # type: ignore[assignment]
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
    if "DRIFT" in os.environ:
        _drift()
    sys.argv = command
    main()


def _compute_in_double() -> None:
    """Train in float64, where the order of a sum almost never changes how a latent is rounded."""
    from pipeline.data import crops as data

    in_single = data.to_tensor
    data.to_tensor = lambda image: in_single(image).double()
    torch.set_default_dtype(torch.float64)


def _poison(step: int) -> None:
    """Make the loss of a step NaN, in this process alone."""
    forward, calls = RateDistortion.forward, iter(range(1, 10**6))

    def spoilt(self: RateDistortion, images: torch.Tensor, noise: Noise) -> dict[str, torch.Tensor]:
        values = forward(self, images, noise)
        return {**values, "loss": values["loss"] * (float("nan") if next(calls) == step else 1.0)}

    RateDistortion.forward = spoilt  # type: ignore[method-assign]


def _drift() -> None:
    """Begin with other weights, as on a machine that rounds the transfer differently."""
    train = Trainer.train

    def drifted(self: Trainer, state: TrainingState) -> TrainingState:
        moved = {name: 1.001 * state.model[name] for name, _ in self.migration.child.named_parameters()}
        return train(self, replace(state, model={**state.model, **moved}))

    Trainer.train = drifted  # type: ignore[method-assign]


def differences(chain: Chain, reference: Chain) -> list[str]:
    """The differences of a chain from an uninterrupted one: bytes, records, metrics, files, leftovers."""
    found: list[str] = []
    for task, other in zip(chain.tasks, reference.tasks, strict=False):
        name = task.stage.name
        if task.checkpoint.read_bytes() != other.checkpoint.read_bytes():
            found.append(f"{name}: other bytes")
        record, expected = record_of(chain, name), record_of(reference, name)
        if (record.status, record.attempts[-1].state) != ("done", "finished"):
            found.append(f"{name}: {record.status}, {record.attempts[-1].state}")
        if [segment.quality for segment in record.segments] != [segment.quality for segment in expected.segments]:
            found.append(f"{name}: other results of segments")
        if history(task.folder) != history(other.folder):
            found.append(f"{name}: other metrics")
        if files_of(task.folder) != files_of(other.folder):
            found.append(f"{name}: other files")
        if task.working(task.inputs()).exists():
            found.append(f"{name}: the working folder is left")
    return found


def files_of(folder: Path) -> set[str]:
    """The files of a stage, but for that of the system metrics, which a short run may not have."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {"system.jsonl"}
