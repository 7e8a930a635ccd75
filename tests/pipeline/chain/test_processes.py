"""Several processes train the same weights as one, and none of them waits for a dead one.

The comparison is in float64. In float32, a gradient that is summed in another order differs by 1e-7. This can move a
latent to the other side of a half, so that it is rounded to the next symbol. The loss then jumps, as it does between
two machines: by 3e-4 of its value, once in thirteen steps of a Phase 1.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from kills import KILLED, attempt, attempts, exit_code
from mini import STAGES, history, mini_chain, record_of
from PIL import Image

from pipeline.weights.checkpoints import read

DOUBLE = {"DOUBLE": "1"}
EVERY_STEP = ["log_every=1", "checkpoint_every=100"]
FEW_STEPS = ["baseline.schedule.scratch.steps=2", "phase1.schedule.align.steps=1", "phase1.schedule.unfrozen.steps=2"]
STEPS = {"align": 10, "frozen": 20, "unfrozen": 20}
FIFTY_STEPS = [
    "baseline.schedule.scratch.steps=50",
    *(f"phase{phase}.schedule.{name}.steps={steps}" for phase in range(1, 5) for name, steps in STEPS.items()),
]


def train(runs: Path, stage: str, settings: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[int]:
    """Train with one process for each environment. Returns their exit codes."""
    if len(environments) == 1:
        return [exit_code(attempt(runs, stage, settings, environments[0]), 900)]
    return [exit_code(process, 900) for process in attempts(runs, stage, settings, environments)]


def losses(runs: Path, stage: str) -> dict[str, list[float]]:
    """The losses of every step, by stage and phase."""
    return {
        f"{task.stage.name} {key}": [value for _, value in values]
        for task in mini_chain(runs, stage).tasks
        for key, values in history(task.folder).items()
        if key.startswith("train/") and key.endswith("/loss")
    }


def weights(runs: Path, stage: str) -> dict[str, torch.Tensor]:
    """The published weights of the chain's last stage."""
    return read(mini_chain(runs, stage).tasks[-1].checkpoint).tensors


def assert_as_one(runs: Path, reference: Path, stage: str) -> None:
    """Compare losses to 1e-5 of their size, and weights to 1e-4."""
    expected, actual = losses(reference, stage), losses(runs, stage)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    for name, tensor in weights(reference, stage).items():
        torch.testing.assert_close(weights(runs, stage)[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_two_processes_in_micro_batches_resumed_by_one_train_as_one(tmp_path: Path) -> None:
    one, both = tmp_path / "one", tmp_path / "both"
    settings = [*EVERY_STEP, *FEW_STEPS, "data.batch_size=4"]
    assert train(one, "phase1", settings, [DOUBLE]) == [0]
    signaled = {**DOUBLE, "DRIFT": "1", "HPCM_FAULT": "step:6", "HPCM_FAULT_SIGNAL": "15"}
    in_parts = [*settings, "data.accumulate=2"]
    processes = attempts(both, "phase1", in_parts, [DOUBLE, signaled])
    assert [exit_code(process) for process in processes] == [143, 143]
    assert "interrupted in frozen at step" in mini_chain(both, "phase1", settings).plan()[-1].reason
    other = tmp_path / "node" / both.name
    shutil.copytree(both, other)
    sorted(other.rglob("segment-*"))[-1].unlink()
    elsewhere = {"FOLDER": str(other.parent), "LOG": str(tmp_path / "log")}
    nodes = [DOUBLE | {"FOLDER": str(tmp_path)}, DOUBLE | elsewhere]
    assert [exit_code(process) for process in attempts(Path(both.name), "phase1", in_parts, nodes)] == [1, 1]
    assert "  training state: process 1 has step 5 (" in (tmp_path / "log").read_text()
    assert train(both, "phase1", in_parts, [DOUBLE]) == [0]
    assert_as_one(both, one, "phase1")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_with_a_message(killed: int, tmp_path: Path) -> None:
    environments: list[dict[str, str]] = [{"LOG": str(tmp_path / f"log-{rank}")} for rank in range(2)]
    environments[killed]["HPCM_FAULT"] = "step:3"
    codes = [exit_code(p) for p in attempts(tmp_path / "runs", "baseline", EVERY_STEP, environments)]
    assert codes[killed] == KILLED
    assert codes[1 - killed] == 1
    printed = (tmp_path / f"log-{1 - killed}").read_text()
    assert f"error: process {2 - killed} of 2 stops because another process has died" in printed


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_with_a_graph_each_train_as_one(tmp_path: Path) -> None:
    settings, gpu = [*EVERY_STEP, *FEW_STEPS, "cuda_graph=true"], {"ACCELERATE_USE_CPU": "false"}
    for count in (1, 2):
        assert train(tmp_path / str(count), "phase1", settings, [gpu] * count) == [0] * count
    found, expected = (losses(tmp_path / name, "phase1") for name in ("2", "1"))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=0.02), name


def test_processes_that_see_other_files_do_not_begin(tmp_path: Path) -> None:
    environments = []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        (folder / "photos").mkdir(parents=True)
        Image.new("RGB", (128, 128), ("black", "white")[rank]).save(folder / "photos" / "one.bmp")
        environments.append({"FOLDER": str(folder), "LOG": str(folder / "log")})
    settings = ["data.train=photos"]
    codes = [exit_code(p) for p in attempts(tmp_path / "runs", "baseline", settings, environments)]
    assert codes == [1, 1]
    for rank in range(2):
        printed = (tmp_path / f"node-{rank}" / "log").read_text()
        assert "error: the processes differ; make them equal in:\n  training images: process 1 has " in printed
        assert "validation images" not in printed.partition("error:")[2]
    assert not (tmp_path / "runs" / "mini" / "lmbda-0.013" / "training").exists()


def test_a_nan_in_one_process_skips_the_step_in_all(tmp_path: Path) -> None:
    assert train(tmp_path, "baseline", EVERY_STEP, [{}, {"POISON": "3"}]) == [0, 0]
    chain = mini_chain(tmp_path, "baseline")
    assert record_of(chain, "baseline").trained.skipped_steps == 1
    logged = history(chain.tasks[0].folder)
    assert logged["train/scratch/skipped_steps"] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert [step for step, _ in logged["train/scratch/loss"]] == [1, 2, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_processes_train_as_one_for_fifty_steps_of_every_phase(tmp_path: Path) -> None:
    """Each stage starts from the same parent. Over hundreds of steps, the order of sums would change the result."""
    one, settings = tmp_path / "one", [*EVERY_STEP, *FIFTY_STEPS, "data.batch_size=6"]
    for stage in STAGES:
        for processes in (2, 3):
            runs = tmp_path / f"{stage}-{processes}"
            if one.exists():
                shutil.copytree(one, runs)
            assert train(runs, stage, settings, [DOUBLE] * processes) == [0] * processes
        assert train(one, stage, settings, [DOUBLE]) == [0]
        for processes in (2, 3):
            assert_as_one(tmp_path / f"{stage}-{processes}", one, stage)
