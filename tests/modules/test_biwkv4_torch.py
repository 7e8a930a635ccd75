"""The Bi-WKV4 op in PyTorch's own machinery: tracing, compilation, autocast, checkpoints, fake tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import modules.biwkv4.flops  # noqa: F401
from modules.biwkv4.op import biwkv4
from tests.modules.test_biwkv4 import assert_same_bits, computed
from tests.modules.test_biwkv4 import draw as inputs


def draw(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [x.to(device) for x in inputs((2, 9, 6), dtype)[0]]


def results(function: Callable[..., Tensor]) -> list[Tensor]:
    """y and the gradients of w, u, k, v."""
    return computed(*inputs((2, 9, 6)), function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [False, True])
def test_opcheck(dtype: torch.dtype, needed: bool) -> None:
    inputs = [x.requires_grad_(needed) for x in draw(dtype)]
    torch.library.opcheck(torch.ops.hpcm.biwkv4.default, inputs)
    torch.library.opcheck(torch.ops.hpcm.biwkv4_backward.default, [torch.randn(2, 9, 6).to(dtype), *draw(dtype)])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def block(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(v) * biwkv4(w / k.shape[1], u / k.shape[1], k * 2, v)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(results(compiled), results(block))


def test_autocast_keeps_w_and_gives_the_layers_dtype() -> None:
    w, u, x, _ = draw()
    linear = torch.nn.Linear(6, 12, bias=False)
    w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        k, v = linear(x).chunk(2, dim=-1)
        y = biwkv4(w, u, k, v)
    assert k.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(y, biwkv4(w, u, k, v), rtol=0, atol=0)
    y.float().sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert linear.weight.grad is not None
    assert linear.weight.grad.isfinite().all()


def test_checkpointing_changes_no_bit() -> None:
    assert_same_bits(results(lambda *x: checkpoint(biwkv4, *x, use_reentrant=False)), results(biwkv4))


def test_inference_mode_and_no_grad_change_no_bit() -> None:
    inputs = draw()
    y = biwkv4(*inputs)
    with torch.no_grad():
        assert torch.equal(biwkv4(*inputs), y)
    with torch.inference_mode():
        assert torch.equal(biwkv4(*draw()), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_meta_and_fake_tensors(dtype: torch.dtype) -> None:
    y = biwkv4(*draw(dtype, "meta"))
    assert (y.device.type, y.dtype, y.shape) == ("meta", dtype, (2, 9, 6))
    with FakeTensorMode():
        fused = torch.empty(2, 9, 18, dtype=dtype)
        y = biwkv4(torch.empty(6), torch.empty(6), fused[..., :6], fused[..., 6:12])
        assert y.is_contiguous()
        assert (y.dtype, y.shape) == (dtype, (2, 9, 6))


def test_second_derivatives_raise_an_error_that_names_the_reference() -> None:
    leaves = [x.requires_grad_() for x in draw()]
    (dk,) = torch.autograd.grad(biwkv4(*leaves).square().sum(), leaves[2:3], create_graph=True)
    with pytest.raises(NotImplementedError, match="biwkv4_reference"):
        dk.sum().backward()


def test_flops_are_counted_in_proportion_to_the_elements() -> None:
    counts = []
    for scale in (1, 3):
        w, u, k, v = draw()
        k = k.repeat(scale, 1, 1).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            biwkv4(w, u, k, v.repeat(scale, 1, 1)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert counts[1] == 3 * counts[0]
