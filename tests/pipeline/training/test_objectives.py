"""Losses, noise, alignment and what a frozen step leaves out."""

import pytest
import torch
from mini import mini_codec, mini_stage
from torch import Tensor

from modules import HPCM, preset_config
from pipeline.evaluation.coding import estimate
from pipeline.evaluation.metrics import EvaluationError, quality_of
from pipeline.recipes.schema import Transfer
from pipeline.training.objectives import Align, Handover, RateDistortion, recorded_calls, training_noise
from pipeline.training.optimizer import set_trainable, trainable_names
from pipeline.training.transfer import new_components, transfer_weights


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 128, 128)


def migrated(segment: int) -> tuple[HPCM, HPCM, frozenset[str]]:
    parent, child = mini_codec(segment - 1), mini_codec(segment)
    ledger = transfer_weights(parent, child, mini_stage(f"phase{segment}").transfer)
    return parent.requires_grad_(False), child, ledger.new


def test_rate_distortion_is_its_formula(images: Tensor) -> None:
    model = mini_codec(0)
    noise = training_noise(model, (128, 128), seed=3, samples=range(4))
    values = RateDistortion(model, 0.01, "mse")(images, noise)
    coded = model(images, training=True, noise=noise)
    mse = (coded["x_hat"] - images).square().mean()
    bits = sum(-likelihood.log2().sum() for likelihood in coded["likelihoods"].values())
    torch.testing.assert_close(values["bpp"], bits / (4 * 128 * 128))
    torch.testing.assert_close(values["loss"], 0.01 * 255**2 * mse + values["bpp"])


def test_ms_ssim_takes_the_place_of_mse() -> None:
    model, images = mini_codec(0), torch.rand(1, 3, 256, 256)
    values = RateDistortion(model, 5.0, "ms-ssim")(images, training_noise(model, (256, 256), 0, [0]))
    torch.testing.assert_close(values["loss"], 5.0 * values["distortion"] + values["bpp"])


def test_an_image_too_small_for_ms_ssim_is_named() -> None:
    image = torch.rand(1, 3, 161, 170)
    assert quality_of(("one.png", image), image, 0.5, 5.0, "ms-ssim").rd_loss == pytest.approx(0.5)
    with pytest.raises(EvaluationError, match=r"two.png: 170×160 pixels; 'metric: ms-ssim' needs at least 161"):
        estimate(mini_codec(0), [("two.png", image[:, :, 1:])], 5.0, "ms-ssim")


def test_noise_is_a_function_of_seed_and_sample() -> None:
    model = mini_codec(0)
    together = training_noise(model, (128, 128), seed=3, samples=[5, 6, 7])
    alone = training_noise(model, (128, 128), seed=3, samples=[6])
    assert torch.equal(together.y[1:2], alone.y)
    assert torch.equal(together.z[1:2], alone.z)
    assert not torch.equal(together.y[0], together.y[1])
    assert not torch.equal(training_noise(model, (128, 128), 4, [6]).y, alone.y)
    assert alone.y.abs().max() <= 0.5
    assert abs(together.y.mean()) < 0.02


@pytest.mark.parametrize("segment", range(1, 5))
def test_a_frozen_step_runs_no_synthesis_and_trains_only_the_new(segment: int, images: Tensor) -> None:
    _, child, new = migrated(segment)
    set_trainable(child, trainable_names(child, "new", new))
    ran = []
    child.g_s.register_forward_hook(lambda *_: ran.append("g_s"))
    values = RateDistortion(child, 0.01, "mse")(images, training_noise(child, (128, 128), 0, range(4)))
    assert ran == []
    assert values.keys() == {"loss", "bpp"}
    values["loss"].backward()
    assert {name for name, parameter in child.named_parameters() if parameter.grad is not None} == new


def test_nothing_below_the_first_new_component_is_differentiated(images: Tensor) -> None:
    _, child, new = migrated(1)
    set_trainable(child, trainable_names(child, "new", new))
    needs_gradient = {}
    for name in ("g_a", "h_s", "y_spatial_prior_s1_s2", "attn_s2", "attn_s3"):
        child.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: needs_gradient.update({name: output.requires_grad})
        )
    RateDistortion(child, 0.01, "mse")(images, training_noise(child, (128, 128), 0, range(4)))
    below = ["g_a", "h_s", "y_spatial_prior_s1_s2", "attn_s2"]
    assert needs_gradient == {**dict.fromkeys(below, False), "attn_s3": True}


@pytest.mark.parametrize(("segment", "sites"), [(1, 5), (2, 4), (3, 2), (4, 10)])
def test_align_has_a_site_for_every_call(segment: int, sites: int, images: Tensor) -> None:
    parent, child, _ = migrated(segment)
    components = new_components(parent, child)
    with recorded_calls(parent, components) as recorded, torch.no_grad():
        parent(images)
    assert sum(map(len, recorded.values())) == sites
    with torch.no_grad():
        parent(images)
    assert sum(map(len, recorded.values())) == sites


def test_align_is_zero_where_the_child_agrees_and_falls_where_not(images: Tensor) -> None:
    noise = training_noise(mini_codec(0), (128, 128), 0, range(4))
    parent, child, _ = migrated(3)
    assert Align(child, parent, new_components(parent, child))(images, noise)["loss"].item() < 1e-10
    parent, child, new = migrated(4)
    set_trainable(child, new)
    objective = Align(child, parent, new_components(parent, child))
    optimizer = torch.optim.Adam([p for p in child.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = objective(images, noise)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_a_codec_without_attention_aligns_and_hands_over(images: Tensor) -> None:
    sizes = mini_stage("baseline").model.overrides
    parent, child = (HPCM(preset_config("phi-context", segment, **sizes)).eval() for segment in (0, 1))
    transfer_weights(parent.requires_grad_(False), child, Transfer(initialization="design"))
    components = new_components(parent, child)
    noise = training_noise(parent, (128, 128), 0, range(4))
    Align(child, parent, components)(images, noise)["loss"].backward()
    assert any(parameter.grad.any() for parameter in child.attn_s3.parameters())
    handover = Handover(child, parent, components)
    with torch.no_grad():
        assert torch.equal(child(images)["likelihoods"]["y"], parent(images)["likelihoods"]["y"])
    handover.end()


def test_align_compares_in_float32_under_autocast(images: Tensor) -> None:
    parent, child, _ = migrated(4)
    objective = Align(child, parent, components := new_components(parent, child))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        loss = objective(images, training_noise(child, (128, 128), 0, range(4)))["loss"]
        with recorded_calls(parent, components) as sites:
            parent(images, training=True)
        pairs = [
            (child.get_submodule(name)(*inputs).double().flatten(1), target.double().flatten(1))
            for name, calls in sites.items()
            for inputs, target in calls
        ]
    expected = torch.stack([((a - b).square().mean(1) / b.var(1)).mean() for a, b in pairs]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
