"""The Bi-WKV4 op against a float64 brute force: values, all gradients, extremes, determinism, layouts."""

import math

import pytest
import torch
from torch import Tensor

from modules.biwkv4 import op as module
from modules.biwkv4.op import biwkv4, biwkv4_reference

NAMES = ("y", "dw", "du", "dk", "dv")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def brute_force(w: Tensor, u: Tensor, k: Tensor, v: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """The definition as a softmax over all positions, in float64, of the rows [begin, end): (B, rows, C)."""
    w, u, k, v = (x.double() for x in (w, u, k, v))
    k = k - k.amax(1, keepdim=True).detach()  # or keys of 1e30 would swallow the decay even in float64
    t = torch.arange(k.shape[1])
    gap = (t[begin:end, None] - t).abs()[..., None]
    weights = torch.softmax(torch.where(gap == 0, u, -(gap - 1) * w) + k[:, None], dim=2)  # (B, rows, T, C)
    return (weights * v[:, None]).sum(2)


def expected(inputs: Inputs, grad_y: Tensor, rows: int = 1024) -> list[Tensor]:
    """y and the gradients of w, u, k, v by brute force, so many rows at a time."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    y = []
    for begin in range(0, grad_y.shape[1], rows):
        block = brute_force(*leaves, begin, begin + rows)
        block.backward(grad_y[:, begin : begin + rows].double())
        y.append(block.detach())
    return [torch.cat(y, 1), *(x.grad for x in leaves if x.grad is not None)]


def actual(inputs: Inputs, grad_y: Tensor, op=biwkv4) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def draw(shape=(2, 37, 19), dtype=torch.float32, seed=0, decay=4.0, boost=0.5) -> tuple[Inputs, Tensor]:
    """Inputs and a gradient of y: keys and values normal, w·T from −decay to 3·decay, u times boost."""
    g = torch.Generator().manual_seed(seed)
    w = torch.linspace(-decay, 3 * decay, shape[2]) / shape[1]
    u = torch.randn(shape[2], generator=g) * boost
    k, v, grad_y = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (w.to(work), u.to(work), k, v), grad_y


def relative(a: Tensor, e: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    assert a.isfinite().all()
    return ((a.double() - e).abs().max() / e.double().abs().max().clamp(min=1e-300)).item()


def assert_close(results: list[Tensor], truth: list[Tensor], bound: float) -> None:
    for name, a, e in zip(NAMES, results, truth, strict=True):
        limit = max(bound, torch.finfo(a.dtype).eps)  # half types: their own rounding
        assert relative(a, e) < limit, f"{name}: {relative(a, e):.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 64, 65, 200])
def test_matches_brute_force(length: int, dtype: torch.dtype) -> None:
    inputs, grad_y = draw((2, length, 5), dtype)
    assert_close(actual(inputs, grad_y), expected(inputs, grad_y), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("channels", [1, 15, 16, 31, 32, 33, 64, 100, 129])
@pytest.mark.parametrize("length", [5, 70])
def test_any_number_of_channels(length: int, channels: int) -> None:
    inputs, grad_y = draw((3, length, channels))
    assert_close(actual(inputs, grad_y), expected(inputs, grad_y), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1023, 1024, 1025, 2047, 2048, 2049, 3000])
def test_where_the_kernels_change_their_ways(length: int, dtype: torch.dtype) -> None:
    inputs, grad_y = draw((1, length, 3), dtype)
    assert_close(actual(inputs, grad_y), expected(inputs, grad_y), 1e-5)


def test_long_sequence() -> None:
    inputs, grad_y = draw((1, 8160, 2))
    assert_close(actual(inputs, grad_y), expected(inputs, grad_y, rows=512), 1e-5)


@pytest.mark.parametrize("whole", [0.0, 1.0, 60.0, -60.0])
def test_longest_sequence_like_the_reference(whole: float) -> None:
    """The reference in float64, which is held to the brute force at lengths that this one can do in seconds."""
    (w, u, k, v), grad_y = draw((1, 65536, 17))
    inputs = (torch.full_like(w, whole / 65536), u / 65536, k, v)
    truth = actual(tuple(x.double() for x in inputs), grad_y, biwkv4_reference)
    assert_close(actual(inputs, grad_y), truth, 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("whole", [0.0, 1.0, 60.0, -60.0])
def test_longest_sequence(whole: float) -> None:
    (w, u, k, v), grad_y = draw((1, 65536, 1))
    inputs = (torch.full_like(w, whole / 65536), u, k, v)
    assert_close(actual(inputs, grad_y), expected(inputs, grad_y, rows=64), 1e-5)


def _peaks(k: Tensor, height: float) -> Tensor:
    k = k.clone()
    for channel in range(k.shape[2]):
        k[:, (7 + 29 * channel) % k.shape[1], channel] = height
    return k


KEYS = {
    "normal": lambda k: k,
    "equal": lambda k: torch.full_like(k, 3.0),
    "equal and low": lambda k: torch.full_like(k, -1e4),
    "all as low as may be": lambda k: torch.full_like(k, torch.finfo(k.dtype).min),
    "uniform ±80": lambda k: (torch.sigmoid(2 * k) * 2 - 1) * 80,
    "either -80 or 80": lambda k: k.sign() * 80,
    "one at 80": lambda k: _peaks(k, 80.0),
    "one at 20": lambda k: _peaks(k, 20.0),
    "one at 8": lambda k: _peaks(k, 8.0),
    "one at 80, others at -80": lambda k: _peaks(k - 80, 80.0),
    "one at -80": lambda k: _peaks(k, -80.0),
    "one masked": lambda k: _peaks(k, -1e30),
    "one at -inf": lambda k: _peaks(k, -math.inf),
    "all but one masked": lambda k: _peaks(torch.full_like(k, -1e30), 0.0),
}


def extreme(keys: str, whole: float, length: int) -> tuple[Inputs, Tensor]:
    """One kind of keys, all decays w·T = whole."""
    if keys == "one at -inf" and length == 1:
        pytest.skip("0 / 0")
    (w, u, k, v), grad_y = draw((1, length, 2))
    return (torch.full_like(w, whole / length), u, KEYS[keys](k), v), grad_y


def assert_within(results: list[Tensor], truth: list[Tensor]) -> None:
    """Each finite and within a relative 1e-5."""
    floor = 1e-9  # against terms of order one or more that cancel: a hundredth of their rounding in float32
    for name, a, e in zip(NAMES, results, truth, strict=True):
        assert a.isfinite().all(), name
        limit = max(1e-5 * e.abs().max().item(), floor)
        assert (a.double() - e).abs().max().item() <= limit, name


@pytest.mark.parametrize("length", [1, 2, 65, 500, 2100])
@pytest.mark.parametrize("whole", [-60.0, -3.0, 1.0, 60.0])
@pytest.mark.parametrize("keys", KEYS)
def test_extremes(keys: str, whole: float, length: int) -> None:
    inputs, grad_y = extreme(keys, whole, length)
    assert_within(actual(inputs, grad_y), expected(inputs, grad_y))


BEYOND = [(300.0, 0.0), (-300.0, 0.0), (1e4, 0.0), (5.0, 90.0), (5.0, -90.0)]


@pytest.mark.parametrize("length", [1, 50, 2100])
@pytest.mark.parametrize(("whole", "boost"), BEYOND)
def test_beyond_the_fast_kernels_bound(whole: float, boost: float, length: int) -> None:
    (w, u, k, v), grad_y = draw((1, length, 35))
    w[3], u[33] = whole / length, boost
    some = [2, 3, 32, 33, 34]  # the brute force takes long, and channels are alone
    y, dw, du, dk, dv = actual((w, u, k, v), grad_y)
    truth = expected((w[some], u[some], k[..., some], v[..., some]), grad_y[..., some])
    assert_close([y[..., some], dw[some], du[some], dk[..., some], dv[..., some]], truth, 1e-5)


def test_nan_is_not_hidden() -> None:
    (w, u, k, v), _ = draw((1, 40, 3))
    k[0, 11, 1] = math.nan
    y = biwkv4(w, u, k, v)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2]].isfinite().all()


def test_reference_matches_brute_force() -> None:
    inputs, grad_y = draw((2, 70, 5), torch.float64)
    assert_close(actual(inputs, grad_y, biwkv4_reference), expected(inputs, grad_y), 1e-12)


@pytest.mark.parametrize("keys", KEYS)
def test_reference_stands_extremes(keys: str) -> None:
    (w, u, k, v), _ = draw((1, 40, 3), torch.float64)
    inputs = (w, u, KEYS[keys](k), v)
    assert relative(biwkv4_reference(*inputs), brute_force(*inputs)) < 1e-10


@pytest.mark.parametrize("op", [biwkv4, biwkv4_reference])
def test_gradcheck(op) -> None:
    inputs, _ = draw((2, 7, 3), torch.float64)
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("shape", [(2, 300, 40), (1, 3000, 70), (1, 2100, 512)])
def test_same_bits_for_any_number_of_threads(shape) -> None:
    inputs, grad_y = draw(shape)
    threads = torch.get_num_threads()
    results = []
    for number in (threads, threads, 1, 2, 3):
        torch.set_num_threads(number)
        results.append(actual(inputs, grad_y))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(1, 300, 3616), (1, 2048, 544), (1, 2100, 512)])
def test_among_others_as_alone(shape) -> None:
    """Large results are stored past the caches, and many strips become whole tasks. Neither changes a bit."""
    (w, u, k, v), grad_y = draw(shape)
    some = slice(32, 64)
    alone = actual((w[some], u[some], k[..., some], v[..., some]), grad_y[..., some])
    for name, a, b in zip(NAMES, actual((w, u, k, v), grad_y), alone, strict=True):
        assert torch.equal(a[..., some], b), name


@pytest.mark.parametrize("channels", [24, 32])
@pytest.mark.parametrize("length", [50, 2500])
def test_views_are_read_in_place(length: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (w, u, _, _), grad_y = draw((2, length, channels))
    fused = torch.randn(2, length, 3 * channels + 1)
    k, v = fused[..., 1 : 1 + channels], fused[..., 2 * channels :][..., :channels]
    packed = actual((w, u, k.contiguous(), v.contiguous()), grad_y)
    copied = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x, **_: copied.append(x.shape) or contiguous(x))
    gradients = torch.ops.hpcm.biwkv4_backward(grad_y, w, u, k, v)
    for name, a, b in zip(NAMES, [biwkv4(w, u, k, v), *gradients], packed, strict=True):
        assert torch.equal(a, b), name
    assert all(len(shape) == 1 for shape in copied)


def test_other_layouts_are_right() -> None:
    (w, u, k, v), grad_y = draw((2, 50, 8))
    packed = actual((w, u, k, v), grad_y)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v, grad_y)]
    for name, a, b in zip(NAMES, actual((w, u, turned[0], turned[1]), turned[2]), packed, strict=True):
        assert torch.equal(a, b), name
    spread = torch.ones(()).expand(2, 50, 8)
    for a, b in zip(actual((w, u, k, v), spread), actual((w, u, k, v), spread.clone()), strict=True):
        assert torch.equal(a, b)


def test_no_sequences() -> None:
    (w, u, k, v), grad_y = draw((0, 5, 3))
    results = actual((w, u, k, v), grad_y)
    assert [tuple(x.shape) for x in results] == [(0, 5, 3), (3,), (3,), (0, 5, 3), (0, 5, 3)]
    assert not results[1].any()
    assert not results[2].any()


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        (lambda w, u, k, v: (w, u, k[0], v), ValueError, "k must be"),
        (lambda w, u, k, v: (w, u, k.long(), v), TypeError, "k must be"),
        (lambda w, u, k, v: (w, u, k, v[:, 1:]), ValueError, "v must be"),
        (lambda w, u, k, v: (w, u, k, v.double()), TypeError, "v must be"),
        (lambda w, u, k, v: (w[1:], u, k, v), ValueError, "w must be"),
        (lambda w, u, k, v: (w, u[None], k, v), ValueError, "u must be"),
        (lambda w, u, k, v: (w.long(), u, k, v), TypeError, "w must be"),
        (lambda w, u, k, v: (w.to("meta"), u, k, v), ValueError, "w must be on"),
        (lambda w, u, k, v: (w, u.to("meta"), k, v), ValueError, "u must be on"),
        (lambda w, u, k, v: (w, u, k, v.to("meta")), ValueError, "v must be on"),
    ],
)
def test_errors_name_the_argument(change, error: type[Exception], argument: str) -> None:
    inputs, _ = draw((2, 6, 4))
    with pytest.raises(error, match=argument):
        biwkv4(*change(*inputs))


def test_op_asks_for_w_in_the_working_dtype() -> None:
    (w, u, k, v), _ = draw((2, 6, 4))
    with pytest.raises(TypeError, match="w must be"):
        torch.ops.hpcm.biwkv4(w.half(), u, k, v)
    assert torch.equal(biwkv4(w.double(), u, k, v), biwkv4(w, u, k, v))


def test_rows_keeps_what_it_can_read() -> None:
    x = torch.randn(2, 5, 12)
    assert module._rows(x[..., 3:7]).data_ptr() == x[..., 3:7].data_ptr()
    assert module._rows(x[..., ::2]).stride(2) == 1
