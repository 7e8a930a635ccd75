"""Likelihoods against the distribution's own formulas, and tables against their definition."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import gennorm

from modules.layers.entropy import TAIL_MASS, GeneralizedGaussian, scale_table


@pytest.fixture
def model() -> GeneralizedGaussian:
    return GeneralizedGaussian().double()


def test_likelihood_is_the_mass_of_the_unit_interval(model: GeneralizedGaussian) -> None:
    residual, scales = torch.linspace(-6, 6, 49).double(), torch.tensor([[0.3], [1.0], [7.0]]).double()
    actual = model(residual, scales)
    distribution = gennorm(1.5, scale=scales.numpy())
    expected = distribution.cdf(residual.numpy() + 0.5) - distribution.cdf(residual.numpy() - 0.5)
    np.testing.assert_allclose(actual, np.maximum(expected, 1e-9), atol=1e-12)


def test_gradients_agree_with_finite_differences(model: GeneralizedGaussian) -> None:
    residual = torch.linspace(-2, 2, 9).double().requires_grad_()
    scales = torch.linspace(0.5, 2, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(model, (residual, scales))


def test_gradient_at_the_mode_is_finite(model: GeneralizedGaussian) -> None:
    residual, scales = torch.tensor([0.5, -0.5, 0.0], requires_grad=True), torch.ones(3, requires_grad=True)
    model.float()(residual, scales).log().sum().backward()
    assert torch.isfinite(residual.grad).all()
    assert torch.isfinite(scales.grad).all()


def test_lower_bounds_pass_only_gradients_that_raise_the_value(model: GeneralizedGaussian) -> None:
    scales = torch.full((2,), 0.05, dtype=torch.float64, requires_grad=True)
    likelihood = model(torch.tensor([1.0, 0.0]).double(), scales)
    likelihood.log().sum().neg().backward()
    assert scales.grad[0] < 0  # a wider distribution would fit r = 1 better: let through
    assert scales.grad[1] == 0  # a narrower one would fit r = 0 better: held at the bound
    assert model(torch.tensor(1e3).double(), torch.tensor(0.12).double()).item() == pytest.approx(1e-9)


@pytest.mark.parametrize("scale", [1e4, 1e7, math.inf, math.nan])
def test_a_scale_beyond_every_table_is_refused_before_memory_is_allocated(
    model: GeneralizedGaussian, scale: float
) -> None:
    with pytest.raises(ValueError, match="too large for a coding table"):
        model.tables(torch.tensor([1.0, scale]))


def test_tables_cover_their_reach_and_sum_to_one(model: GeneralizedGaussian) -> None:
    scales = scale_table()
    cdfs, lengths, offsets = model.tables(scales)
    reach = np.ceil(np.maximum(scales.double(), 0.12) * gennorm(1.5).isf(TAIL_MASS / 2)).int()
    assert torch.equal(offsets, -reach)
    assert torch.equal(lengths, 2 * reach + 3)
    for cdf, length in zip(cdfs, lengths, strict=True):
        used = cdf[:length]
        assert used[0] == 0
        assert used[-1] == 2**16
        assert (used.diff() > 0).all()
    assert scales[0] == pytest.approx(0.12)
    assert scales[-1] == pytest.approx(64)
    assert len(scales) == 60


def test_writing_into_tables_does_not_change_those_of_the_next_codec(model: GeneralizedGaussian) -> None:
    scales = torch.tensor([0.5, 2.0])
    tables = model.tables(scales)
    expected = [table.clone() for table in tables]
    for table in tables:
        table.zero_()
    assert all(map(torch.equal, model.tables(scales), expected))
