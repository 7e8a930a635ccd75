"""Training steps with values that are not finite, and with optional settings."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from mini import Notes, logged, mini_stage, trainer_of

from pipeline.recipes.schema import Segment, StepDecay
from pipeline.training import reporting
from pipeline.training.optimizer import optimizer_tensors, restore_optimizer, schedule_factor
from pipeline.training.trainer import Trainer, TrainingError
from pipeline.weights.training_state import Progress, StateFolder, TrainingState


@pytest.fixture(autouse=True)
def _forget_precision() -> Iterator[None]:
    """Reset the precision after a test, because Accelerate keeps it for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def spoil(trainer: Trainer, added: float, *steps: int) -> None:
    """Add a number to the reconstructions of these steps, the first of which is 0."""
    numbers = iter(range(10**6))

    def change(module: torch.nn.Module, inputs: object, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**output, "x_hat": output["x_hat"] + (added if next(numbers) in steps else 0.0)}

    trainer.migration.child.register_forward_hook(change)


def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    trainer, start = trainer_of(mini_stage("baseline"), tmp_path)
    spoil(trainer, float("nan"), 1, 4)
    end = trainer.train(start)
    assert end.progress.bad_steps == 2
    assert logged(trainer)[6]["train/scratch/skipped_steps"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in end.model.values())


def test_a_run_of_non_finite_steps_stops_with_the_last_good_state(tmp_path: Path) -> None:
    stage = mini_stage("baseline")
    stage = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"max_bad_steps": 1})})
    trainer, start = trainer_of(stage, tmp_path)
    spoil(trainer, float("nan"), 4, 5)
    with pytest.raises(TrainingError, match=r"2 steps in a row .* not finite, up to step 6"):
        trainer.train(start)
    kept, _ = trainer.states.newest()
    assert kept.progress.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in kept.model.values())


def test_a_loss_that_explodes_is_reported_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "LOSSES_KEPT", 3)
    notes = Notes()
    trainer, start = trainer_of(mini_stage("baseline"), tmp_path, watcher=notes)
    spoil(trainer, 100.0, 4)
    end = trainer.train(start)
    assert end.progress.exploded_steps == 1
    assert logged(trainer)[4]["train/scratch/exploded_steps"] == 0
    assert logged(trainer)[6]["train/scratch/exploded_steps"] == 1
    (line,) = [line for line in notes.lines if "explodes" in line]
    assert line.startswith("scratch, step 5: the loss explodes: ")


def test_bf16_trains_through_accelerate(tmp_path: Path) -> None:
    trainer, start = trainer_of(mini_stage("baseline"), tmp_path, "bf16")
    dtypes = set()
    trainer.migration.child.g_a.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    before = start.model["g_a.branch.0.weight"].clone()
    end = trainer.train(start)
    assert dtypes == {torch.bfloat16}
    assert end.progress.bad_steps == 0
    assert not torch.equal(end.model["g_a.branch.0.weight"], before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_resumed_optimizer_continues_bit_for_bit(device: str, tmp_path: Path) -> None:
    def adam(model: torch.nn.Module) -> torch.optim.Adam:
        names, parameters = zip(*model.named_parameters(), strict=True)
        return torch.optim.Adam([{"params": parameters, "names": names}], fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 4, 8, 8, device=device)).square().sum().backward()
        optimizer.step()

    model, again = (torch.nn.Conv2d(4, 4, 3).to(device, memory_format=torch.channels_last) for _ in range(2))
    optimizer = adam(model)
    step(model, optimizer)
    states = StateFolder(tmp_path)
    states.save(TrainingState(Progress(), model.state_dict(), optimizer_tensors(optimizer)))
    kept, _ = states.newest()
    again.load_state_dict(kept.model)
    resumed = adam(again)
    restore_optimizer(resumed, kept.optimizer)
    step(model, optimizer)
    step(again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_all_of_a_resumed_optimizer_is_on_the_parameters_device() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 2, device="meta"))
    optimizer = torch.optim.Adam([{"params": [weight], "names": ["weight"]}])
    kept = {"step/weight": torch.tensor(7.0), "exp_avg/weight": torch.ones(3, 2), "exp_avg_sq/weight": torch.ones(3, 2)}
    restore_optimizer(optimizer, kept)
    assert {name: (state.device.type, state.dtype, state.shape) for name, state in optimizer.state[weight].items()} == {
        name.partition("/")[0]: ("meta", torch.float32, value.shape) for name, value in kept.items()
    }


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer, start = trainer_of(
            mini_stage("baseline").model_copy(update={"compile": compiled}), tmp_path / str(compiled)
        )
        trainer.train(start)
        losses.append([values["train/scratch/loss"] for values in logged(trainer).values()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_schedule_rises_then_falls() -> None:
    segment = Segment(name="p", train="all", objective="rate-distortion", steps=100, lr={"default": 1.0}, warmup=10)
    factors = [schedule_factor(segment, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:] == [1.0] * 91
    cosine = segment.model_copy(update={"decay": "cosine", "warmup": 0})
    factors = [schedule_factor(cosine, step) for step in range(100)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[50] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    drops = segment.model_copy(update={"decay": StepDecay(at=(30, 60), factor=0.1)})
    assert [schedule_factor(drops, step) for step in (29, 30, 59, 60, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
