"""Validation within a segment, and the weights with which it ends."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mini import Metrics, Notes, history, interrupt, mini_chain, mini_stage, run_chain, trainer_of

from pipeline.recipes.schema import Stage
from pipeline.training.reporting import Reporting
from pipeline.training.validation import WeightAverage
from pipeline.weights.published import Quality
from pipeline.weights.training_state import TrainingState


def baseline(**fields: object) -> Stage:
    stage = mini_stage("baseline")
    data = stage.data.model_copy(update={"batch_size": 1})
    return stage.model_copy(update={"data": data, "validate_every": 2, "checkpoint_every": 1, **fields})


def train(stage: Stage, losses: Sequence[float], states: Path) -> tuple[TrainingState, list[torch.Tensor], Notes]:
    """Train with these validation losses. Returns the end, one weight at each validation, and the notes."""
    torch.manual_seed(0)
    notes, seen = Notes(), []
    trainer, start = trainer_of(stage, states)
    weight = trainer.migration.child.g_a.branch[0].weight

    def validate() -> Quality:
        seen.append(weight.detach().clone())
        return Quality(0.5, 30.0, None, losses[len(seen) - 1])

    trainer.reporting = Reporting(Metrics(), notes, validate)
    return trainer.train(start), seen, notes


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_segment_ends_with_its_best_weights(ema: float | None, tmp_path: Path) -> None:
    end, (second, fourth, last, kept), notes = train(baseline(keep="best", ema=ema), [3.0, 1.0, 2.0, 1.0], tmp_path)
    assert torch.equal(end.model["g_a.branch.0.weight"], fourth)
    assert not torch.equal(fourth, second)
    assert not torch.equal(fourth, last)
    assert torch.equal(kept, fourth)
    assert notes.lines[-2].startswith("scratch ends with the weights of step 4: their validation loss, 1.0000")
    assert notes.lines[-1].startswith("after scratch: validation loss 1.0000")
    last_state, (_, _, last_again), _ = train(baseline(keep="best", ema=ema), [3.0, 1.0, 0.5], tmp_path / "other")
    assert torch.equal(last_state.model["g_a.branch.0.weight"], last_again)
    assert torch.equal(last_again, last)


def test_validation_changes_nothing_unless_the_best_weights_are_kept(tmp_path: Path) -> None:
    nan = float("nan")
    plain = {"validate_every": None}
    best = {"keep": "best"}
    cases = [(plain, [1.0]), ({}, [1.0, 2.0, 3.0]), (best, [1.0, 2.0, 3.0, 1.0]), (best, [nan, nan, nan])]
    ends = [
        train(baseline(**fields), losses, tmp_path / str(n))[0].model["g_a.branch.0.weight"]
        for n, (fields, losses) in enumerate(cases)
    ]
    assert [torch.equal(ends[0], end) for end in ends] == [True, True, False, True]


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    nan = float("nan")
    end, (second, *_), _ = train(baseline(keep="best"), [2.0, nan, nan, 2.0], tmp_path)
    assert torch.equal(end.model["g_a.branch.0.weight"], second)


SETTINGS = [
    "keep=best", "validate_every=1", "ema=0.9", "optimizer.weight_decay=0.1", "data.accumulate=2",
    "data.batch_size=2", "schedule.scratch.decay={at: [2, 4], factor: 0.5}", "schedule.scratch.lr={default: 1.0e-2}",
]  # fmt: skip


def test_a_run_with_all_options_resumes_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    reference, chain = (mini_chain(folder, "baseline", SETTINGS) for folder in (tmp_path / "reference", runs))
    run_chain(reference)
    for step in (2, 5):  # Between two states of `checkpoint_every`.
        interrupt(chain, "scratch", step)
    run_chain(chain)
    assert chain.tasks[0].checkpoint.read_bytes() == reference.tasks[0].checkpoint.read_bytes()
    logged = history(chain.tasks[0].folder)
    assert [step for step, _ in logged["val/rd_loss"]] == [1, 2, 3, 4, 5, 6]
    assert logged == history(reference.tasks[0].folder)
    # The validation images select the weights, so they are an input of the stage.
    assert "validation images" in chain.tasks[0].inputs()
    assert "validation images" not in mini_chain(runs, "baseline").tasks[0].inputs()


def test_the_average_of_the_weights_moves_and_takes_their_place() -> None:
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.5)
    expected = float(model.weight)
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert average.values.keys() == {"weight"}
    average.apply()
    assert float(model.weight) == pytest.approx(expected, rel=1e-6)
