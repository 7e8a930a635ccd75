"""The codec computes what the official implementation computes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from formula import weight
from torch import Tensor

from modules import HPCM

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("preset", ["base", "large"])
def test_names_and_shapes_are_the_published_checkpoints(preset: str) -> None:
    expected = json.loads((GOLDENS / f"hpcm_{preset}_state_dict.json").read_text())
    actual = {name: list(tensor.shape) for name, tensor in HPCM.from_preset(preset).state_dict().items()}
    assert list(actual.items()) == list(expected.items())


def golden_model(**options: float) -> HPCM:
    model = HPCM.from_preset("base")
    state = {
        name: torch.from_numpy(weight(name, tuple(tensor.shape), **options))
        if tensor.numel() and not name.startswith("entropy_estimation")
        else tensor
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize(("name", "options"), [("hpcm_base_256", {}), ("hpcm_base_256_bounds", {"scale_bias": 0.0})])
@torch.no_grad()
def test_values_are_the_official_ones(name: str, options: dict[str, float], golden_image: Tensor) -> None:
    # In double precision no residual falls on the other side of a half by the machine's own rounding errors; the
    # likelihoods stay in single precision, whose cancellation in the tails is part of the official bits.
    model, image = golden_model(**options).double(), golden_image.double()
    model.entropy_estimation.float().register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
    coded = model(image)
    y = model.g_a(image)
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
    for latent, likelihood in coded["likelihoods"].items():
        np.testing.assert_allclose(-likelihood.log2().sum().item(), expected[f"bits_{latent}"], rtol=1e-4)


@torch.no_grad()
def test_single_precision_gives_the_official_bits(golden_image: Tensor) -> None:
    likelihoods = golden_model()(golden_image)["likelihoods"]
    for latent, likelihood in likelihoods.items():
        bits = -likelihood.log2().sum().item()
        np.testing.assert_allclose(bits, golden("hpcm_base_256")[f"bits_{latent}"], rtol=1e-4)
