"""The Bi-WKV4 op against a float64 brute force: values, all gradients, extremes, determinism, PyTorch."""

import pytest
import torch
from torch import Tensor

from modules.biwkv4 import biwkv4, biwkv4_reference

NAMES = ("y", "dw", "du", "dk", "dv")


def brute_force(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition as a (T, T) softmax in float64. w, u (C,); k, v (B, T, C); returns (B, T, C)."""
    w, u, k, v = (x.double() for x in (w, u, k, v))
    t = torch.arange(k.shape[1])
    gap = (t[:, None] - t).abs()
    bias = torch.where((gap == 0)[..., None], u, -(gap - 1)[..., None] * w)  # (T, T, C)
    weights = torch.softmax(bias + k[:, None], dim=2)  # (B, T, T, C)
    return (weights * v[:, None]).sum(2)


def value_and_gradients(op, inputs, grad_y: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(y.dtype)))


def draw(shape=(2, 37, 19), dtype=torch.float32, seed=0, decay=4.0, boost=0.5):
    """w, u, k, v and a gradient of y: standard normal keys and values, |w·T| up to about 3·decay."""
    g = torch.Generator().manual_seed(seed)
    channels = shape[2]
    w = torch.randn(channels, generator=g) * decay / shape[1]
    u = torch.randn(channels, generator=g) * boost
    k, v, grad_y = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (w.to(work), u.to(work), k, v), grad_y


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 64, 65, 200])
def test_matches_brute_force(length: int, dtype: torch.dtype) -> None:
    inputs, grad_y = draw((2, length, 5), dtype)
    expected = value_and_gradients(brute_force, [x.double() for x in inputs], grad_y)
    actual = value_and_gradients(biwkv4, inputs, grad_y)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative(a, e) < (1e-12 if dtype == torch.float64 else 1e-5), name


def test_reference_matches_brute_force() -> None:
    inputs, grad_y = draw((2, 70, 5), torch.float64)
    expected = value_and_gradients(brute_force, inputs, grad_y)
    actual = value_and_gradients(biwkv4_reference, inputs, grad_y)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert relative(a, e) < 1e-12, name


@pytest.mark.parametrize("op", [biwkv4, biwkv4_reference])
def test_gradcheck(op) -> None:
    inputs, _ = draw((2, 7, 3), torch.float64)
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs])


def test_opcheck() -> None:
    inputs, _ = draw((2, 9, 3))
    torch.library.opcheck(torch.ops.hpcm.biwkv4.default, inputs)
    torch.library.opcheck(torch.ops.hpcm.biwkv4.default, [x.requires_grad_() for x in inputs])
