"""A stage that turns a codec of one rate into one of several."""

import re
from pathlib import Path

import pytest
import torch
from mini import Finished, Moments, copied, history, interrupt, mini_chain, record_of, run_chain

from pipeline.chain.chain import Chain
from pipeline.chain.stage_codec import codec_config
from pipeline.recipes.loading import RecipeError
from pipeline.weights.checkpoints import load_codec


@pytest.fixture(scope="module")
def variable(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, Moments]:
    """A chain with a codec of three rates, and what its states held; not to be changed."""
    runs = tmp_path_factory.mktemp("variable") / "runs"
    copied(finished[0], runs, "baseline")
    chain = mini_chain(runs, "variable")
    run_chain(chain, moments := Moments(chain))
    return chain, moments


def test_the_frozen_segment_trains_the_vectors_and_nothing_else(variable: tuple[Chain, Moments]) -> None:
    start, frozen = (variable[1].tensors[name] for name in ("frozen", "unfrozen"))
    moved = {name for name in start if not torch.equal(start[name], frozen[name])}
    assert moved == {f"rate_vectors.{name}" for name in ("gain", "inverse_gain", "steps", "scales", "shifts")}
    assert record_of(variable[0], "variable").start.step0_gap == pytest.approx(0, abs=1e-4)


def test_every_rate_is_evaluated_and_logged(variable: tuple[Chain, Moments]) -> None:
    chain, notes = variable
    record, metrics = record_of(chain, "variable"), history(chain.folder / "variable")
    rates = record.evaluated.rates
    assert [rate.lmbda for rate in rates] == [0.004, 0.013, 0.04]
    assert rates[1].quality == record.quality
    assert rates[0].quality.bpp < rates[1].quality.bpp < rates[2].quality.bpp
    assert metrics["final/lmbda-0.004/bpp"] == [(8, rates[0].quality.bpp)]
    assert any(line.startswith("λ = 0.04: ") for line in notes.lines)
    codec = load_codec(chain.tasks[-1].checkpoint)
    assert codec.config.rates == (0.004, 0.013, 0.04)


def test_a_stage_interrupted_in_both_segments_ends_as_if_it_had_not_been(
    finished: Finished, variable: tuple[Chain, Moments], runs: Path
) -> None:
    reference = variable[0].tasks[-1]
    copied(finished[0], runs, "baseline")
    chain = mini_chain(runs, "variable", [f"data.val={reference.stage.data.val}"])
    for segment, step in (("frozen", 2), ("unfrozen", 3)):
        interrupt(chain, segment, step)
    run_chain(chain)
    assert chain.tasks[-1].checkpoint.read_bytes() == reference.checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("variable.model.overrides.rates=[0.02, 0.01]", "give 2 to 63 positive λ in ascending order"),
        (
            "variable.model.overrides.rates=[0.02, 0.04]",
            "the chain's λ = 0.013 must lie between the first and the last",
        ),
    ],
)
def test_rates_that_cannot_be_are_refused_before_anything_is_trained(setting: str, problem: str, runs: Path) -> None:
    with pytest.raises(RecipeError, match=rf"{re.escape(setting)}: model\.overrides\.rates: {problem}"):
        codec_config(mini_chain(runs, "variable", [setting]).tasks[-1])
