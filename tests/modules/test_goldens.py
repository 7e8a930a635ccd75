"""The codec computes what the official implementation computes."""

from pathlib import Path

import formula
import numpy as np
import pytest
import torch
from official_files import GOLDENS, formula_state, official_shapes
from torch import Tensor

from modules import HPCM, preset_config


@pytest.fixture(scope="module")
def model() -> HPCM:
    """HPCM-Base with the weights of the formula, whose scales stay clear of their lower bound."""
    model = HPCM.from_preset("base").eval()
    model.load_state_dict(formula_state("base"))
    return model


def set_scale_bias(model: HPCM, value: float) -> None:
    """Change the formula's parameter that the predicted scales are near to."""
    for key in formula._SCALE_BIASES & model.state_dict().keys():
        parameter = model.get_parameter(key)
        parameter.copy_(torch.from_numpy(formula.weight(key, tuple(parameter.shape), value)))


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(Path(GOLDENS, f"{name}.npz")) as file:
        return dict(file)


def assert_official_bits(coded: dict[str, dict[str, Tensor]], expected: dict[str, np.ndarray]) -> None:
    for latent, likelihood in coded["likelihoods"].items():
        np.testing.assert_allclose(-likelihood.log2().sum().item(), expected[f"bits_{latent}"], rtol=1e-4)


@pytest.mark.parametrize("preset", ["base", "large", "phi-context"])
def test_names_shapes_and_their_order_are_the_official_ones(preset: str) -> None:
    state = HPCM.on_meta(preset_config(preset)).state_dict()
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == list(official_shapes(preset).items())


@torch.no_grad()
def test_single_precision_gives_the_official_bits(model: HPCM, golden_image: Tensor) -> None:
    set_scale_bias(model, 2.0)
    assert_official_bits(model.float()(golden_image), golden("hpcm_base_256"))


@pytest.mark.parametrize(("name", "scale_bias"), [("hpcm_base_256", 2.0), ("hpcm_base_256_bounds", 0.0)])
@torch.no_grad()
def test_double_precision_gives_the_official_values(
    name: str, scale_bias: float, model: HPCM, golden_image: Tensor
) -> None:
    set_scale_bias(model, scale_bias)
    # In double precision, no residual is rounded to another integer because of the machine's rounding errors. The
    # likelihoods stay in single precision, whose cancellation in the tails is part of the official bits.
    image = golden_image.double()
    model.double().entropy_estimation.float()
    hook = model.entropy_estimation.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    coded, y = model(image), model.g_a(image)
    hook.remove()
    z_hat = (model.h_a(y) - model.means_hyper).round() + model.means_hyper
    actual = {
        "x_hat": coded["x_hat"][:, :, ::4, ::4],
        "y": y[:, ::4],
        "params": model.h_s(z_hat)[:, ::8],
        "y_hat": coded["y_hat"][:, ::2],
        "scales": coded["scales"][:, ::2],
        "y_likelihoods": coded["likelihoods"]["y"][:, ::2],
        "z_likelihoods": coded["likelihoods"]["z"][:, ::2],
    }
    expected = golden(name)
    assert expected.keys() == actual.keys() | {"bits_y", "bits_z"}
    for key, tensor in actual.items():
        reach = float(np.ptp(expected[key]))
        np.testing.assert_allclose(tensor.numpy(), expected[key], rtol=0, atol=1e-3 * reach, err_msg=key)
    assert_official_bits(coded, expected)
