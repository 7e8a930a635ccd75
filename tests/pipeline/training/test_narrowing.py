"""Narrower forms of the parent's modules and fitted last layers: exact where they can be, better with more channels."""

import json
from pathlib import Path

import pytest
import torch
from mini import Finished, copied, mini_chain, mini_codec, run_chain
from torch import Tensor, nn

from modules import HPCM, preset_config
from modules.layers.blocks import Narrowable
from modules.layers.residual import DWConvRB, PConvRB
from modules.layers.rwkv import ChannelMix, SpatialMix
from pipeline.recipes.schema import Transfer
from pipeline.training.least_squares import Moments, choose_channels, rows_of, set_layer, solve_fit, solve_part
from pipeline.training.narrowing import fit, narrow, narrowable_pairs
from pipeline.training.objectives import Align, training_noise
from pipeline.training.transfer import transfer_weights

NARROWABLE = {
    "DWConvRB": lambda rate: DWConvRB(8, rate).branch,
    "PConvRB": lambda rate: PConvRB(8, rate).branch,
    "ChannelMix": lambda rate: ChannelMix(8, rate),
    "SpatialMix": lambda rate: SpatialMix(8, rate),
}


def codec(phase: int, **overrides: object) -> HPCM:
    """A small codec; its priors have 48 channels, and 96 inside the parent's blocks."""
    attention = {"cross-attention": {"heads": 4}, "rwkv": {"hidden_rate": 1}}
    sizes = {"M": 16, "N": 8, "widths": (8, 8, 16), "attention": attention}
    return HPCM(preset_config("tiny", phase, **{**sizes, **overrides})).eval()


@pytest.fixture
def crops() -> list[Tensor]:
    return [torch.rand(2, 3, 128, 128)]


@pytest.mark.parametrize("name", NARROWABLE)
@torch.no_grad()
def test_a_module_narrowed_to_its_full_width_is_the_module(name: str) -> None:
    wide, same = NARROWABLE[name](2).double(), NARROWABLE[name](2).double()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    assert isinstance(wide, Narrowable)
    every = torch.arange(wide.last_linear.weight.shape[1])
    same.keep_channels(wide, every)
    same.last_linear.load_state_dict(wide.last_linear.state_dict())
    assert torch.equal(same(x), wide(x))


@torch.no_grad()
def test_the_error_falls_with_the_width_and_is_the_measured_one() -> None:
    wide = DWConvRB(8, 4).branch.double()
    x = torch.randn(16, 8, 6, 6, dtype=torch.float64)
    moments = Moments(32)
    hook = wide[3].register_forward_pre_hook(lambda layer, given: moments.add(rows_of(given[0], layer)))
    target = wide(x)
    hook.remove()
    errors = []
    for rate in (0.5, 1, 2, 4):
        narrow_form = DWConvRB(8, rate).branch.double()
        weight = wide[3].weight.flatten(1)
        index = choose_channels(weight, moments.covariance, round(8 * rate))
        assert torch.equal(index, index.unique())
        narrow_form.keep_channels(wide, index)
        solution = solve_part(weight, wide[3].bias, moments, index)
        set_layer(narrow_form.last_linear, solution)
        missed = (narrow_form(x) - target).square().sum()
        varied = (target - target.mean((0, 2, 3), keepdim=True)).square().sum()
        assert solution.error == pytest.approx(float(missed / varied), rel=1e-3, abs=1e-8)
        errors.append(solution.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8 < errors[0]


def test_greedy_choice_beats_the_most_varying_channels() -> None:
    x = torch.randn(500, 6, dtype=torch.float64)
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]  # says nothing that channel 0 does not
    weight = torch.diag(torch.tensor([3.0, 3.0, 2.0, 1.0, 0.1, 0.1]))
    moments = Moments(6)
    moments.add(x)
    assert choose_channels(weight, moments.covariance, 3).tolist() in ([0, 2, 3], [1, 2, 3])


def test_a_linear_target_is_fitted_exactly() -> None:
    x, layer = torch.randn(300, 5, dtype=torch.float64), nn.Linear(5, 3).double()
    moments = Moments(8)
    for part in torch.cat((x, layer(x)), dim=1).split(77):
        moments.add(part)
    solution = solve_fit(moments, inputs=5)
    torch.testing.assert_close(solution.weight, layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(solution.bias, layer.bias.detach(), atol=1e-5, rtol=1e-4)
    assert solution.error < 1e-9


@torch.no_grad()
def test_a_prior_that_keeps_the_convolutions_starts_as_the_parent(picture: Tensor) -> None:
    kept = {"kind": "rwkv", "channel_mix": "conv", "hidden_rate": 2, "mix_rate": 0.25}
    priors = {"y_spatial_prior_s1_s2": {**kept, "blocks": 2, "last_blocks": 1}, "y_spatial_prior_s3": kept}
    parent, child = codec(0), codec(0, **priors)
    ledger = transfer_weights(parent, child, Transfer())
    assert "dropped" not in ledger.counts()
    expected, actual = parent(picture), child(picture)
    assert torch.equal(actual["x_hat"], expected["x_hat"])
    assert torch.equal(actual["likelihoods"]["y"], expected["likelihoods"]["y"])


@torch.no_grad()
def test_narrowing_comes_closer_with_more_channels(crops: list[Tensor]) -> None:
    parent = codec(0)
    expected = parent(crops[0])["likelihoods"]["y"].log2()
    gaps = []
    for rate in (0.25, 1):
        child = codec(0, prior={"dwconv": {"hidden_rate": rate}})
        transfer_weights(parent, child, Transfer())
        pairs = narrowable_pairs(parent, child)
        assert len(pairs) == 8
        sites = narrow(parent, child, pairs, crops)
        assert [site.name for site in sites][:3] == [
            "y_spatial_prior_s1_s2.branch_1.0.branch", "y_spatial_prior_s1_s2.branch_1.1.branch",
            "y_spatial_prior_s1_s2.branch_2.0.branch",
        ]  # fmt: skip
        gaps.append(float((child(crops[0])["likelihoods"]["y"].log2() - expected).abs().mean()))
    assert gaps[1] < gaps[0]


@torch.no_grad()
def test_transforms_are_narrowed_as_well(crops: list[Tensor]) -> None:
    parent, child = codec(0), codec(0, transform_hidden_rate=1)
    transfer_weights(parent, child, Transfer())
    sites = narrow(parent, child, narrowable_pairs(parent, child), crops)
    assert {site.name.split(".")[0] for site in sites} == {"g_a"}  # g_s does not run where nothing is reconstructed


@torch.no_grad()
def test_a_fitted_component_is_nearer_to_its_predecessor(crops: list[Tensor]) -> None:
    parent, child = mini_codec(0).eval(), mini_codec(1).eval()
    transfer_weights(parent, child, Transfer())
    align = Align(child, parent, ["attn_s3"])
    noise = training_noise(child, (128, 128), 0, [0, 1])
    before = float(align(crops[0], noise)["loss"])
    (site,) = fit(parent, child, crops)
    assert site.name == "attn_s3.output_proj"
    assert float(align(crops[0], noise)["loss"]) < before


def test_a_stage_records_what_was_narrowed_and_fitted(finished: Finished, runs: Path) -> None:
    copied(finished[0], runs, "baseline")
    settings = ["model.overrides.prior.dwconv.hidden_rate=0.5", "transfer.fit=true", "transfer.calibration=2"]
    chain = mini_chain(runs, "phase1", [f"phase1.{setting}" for setting in settings])
    run_chain(chain)
    kinds = {entry["kind"] for entry in json.loads((chain.folder / "phase1" / "ledger.json").read_text())}
    assert {"copied", "narrowed", "fitted"} <= kinds
