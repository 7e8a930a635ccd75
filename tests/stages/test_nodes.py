"""Two machines train the same weights as one. Each is a network namespace with a command of stages/README.md."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mini import ENVIRONMENT, FOLDER, history, mini_chain

from pipeline.weights.checkpoints import read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]

ROOT = Path(__file__).parents[2]
NODES = ("hpcm-node0", "hpcm-node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PATIENCE = 900.0
"""Seconds that a part of the run may take on a busy machine."""
PATHS = (Path(__file__).parent, ROOT / "tests" / "pipeline", ROOT)
SETTINGS = ["log_every=1", "checkpoint_every=2", "data.batch_size=4", "baseline.schedule.scratch.steps=12"]


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


@pytest.fixture
def network() -> Iterator[None]:
    """Two network namespaces that are connected only to each other."""
    for node in NODES:
        ip("netns", "del", node, check=False)
        ip("netns", "add", node)
    try:
        ip("link", "add", "cable", "netns", NODES[0], "type", "veth", "peer", "name", "cable", "netns", NODES[1])
        for node, address in zip(NODES, ADDRESSES, strict=True):
            for arguments in (("addr", "add", f"{address}/24", "dev", "cable"), ("link", "set", "cable", "up")):
                ip("-n", node, *arguments)
            ip("-n", node, "link", "set", "lo", "up")
        yield
    finally:
        for node in NODES:
            ip("netns", "del", node)


def options(runs: Path) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["-m", "double", "run", "baseline", "--recipe", str(FOLDER), "--runs", str(runs), *settings]


def environment(**more: str) -> dict[str, str]:
    return {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(map(str, PATHS)), **more}


def start(rank: int, runs: Path, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start a machine's part of the run; its output goes to `log`."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    launch += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0]]
    launch += ["--main_process_port", "29511", *options(runs)]
    found = environment(GLOO_SOCKET_IFNAME="cable", **more)
    with log.open("ab") as file:
        command = ["ip", "netns", "exec", NODES[rank], *launch]
        return subprocess.Popen(command, cwd=ROOT, env=found, stdout=file, stderr=file)


def test_two_machines_train_as_one_and_one_that_dies_ends_the_other(network: None, tmp_path: Path) -> None:
    runs, reference = tmp_path / "runs", tmp_path / "reference"
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    first = start(0, runs, logs[0])
    second = start(1, runs, logs[1], HPCM_FAULT="step:5")
    assert second.wait(PATIENCE)
    died = time.monotonic()
    assert first.wait(120)
    print(f"the other machine ended after {time.monotonic() - died:.1f} s")
    assert time.monotonic() - died < 60
    assert "error: process 1 of 2 stops because another process has died" in logs[0].read_text()

    assert [machine.wait(PATIENCE) for machine in [start(rank, runs, logs[rank]) for rank in range(2)]] == [0, 0]
    resumed = re.search(r"resumed in scratch at step (\d+)", logs[0].read_text())
    assert resumed is not None
    assert int(resumed[1]) >= 2
    assert "baseline: " not in logs[1].read_text()  # only the first process prints

    subprocess.run([sys.executable, *options(reference)], cwd=ROOT, env=environment(), check=True)
    chains = [mini_chain(folder, "baseline") for folder in (runs, reference)]
    logged = [history(chain.folder / "baseline")["train/scratch/loss"] for chain in chains]
    assert [step for step, _ in logged[0]] == list(range(1, 13))
    assert [loss for _, loss in logged[0]] == pytest.approx([loss for _, loss in logged[1]], rel=1e-5)
    weights = [read(chain.tasks[0].checkpoint).tensors for chain in chains]
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-4
