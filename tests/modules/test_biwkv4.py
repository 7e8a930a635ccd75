"""The Bi-WKV4 kernels against their definition: values, all gradients, extremes, determinism, layouts."""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.biwkv4 import op
from modules.biwkv4.kernels import Kernels
from modules.biwkv4.op import biwkv4, biwkv4_reference
from modules.native_build import SOURCES

NAMES = ("y", "dw", "du", "dk", "dv")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def brute_force(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition as a softmax over all positions."""
    k = k - k.amax(1, keepdim=True).detach()  # Beside keys of 1e30 the decay would be lost even in float64.
    t = torch.arange(k.shape[1])
    gap = (t[:, None] - t).abs()[..., None]
    weights = torch.softmax(torch.where(gap == 0, u, -(gap - 1) * w) + k[:, None], dim=2)  # (B, T, T, C)
    return (weights * v[:, None]).sum(2)


def computed(inputs: Inputs, grad_y: Tensor, function: Callable[..., Tensor] = biwkv4) -> list[Tensor]:
    """y and the gradients of w, u, k, v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def expected(inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
    """The same in float64: by brute force, or for long sequences by the reference, which is tested against it."""
    doubles = (inputs[0].double(), inputs[1].double(), inputs[2].double(), inputs[3].double())
    return computed(doubles, grad_y, brute_force if grad_y.shape[1] <= 64 else biwkv4_reference)


def draw(shape=(2, 37, 19), dtype=torch.float32, seed=0, decay=4.0, boost=0.5) -> tuple[Inputs, Tensor]:
    """Inputs and a gradient of y: keys and values normal, w·T from −decay to 3·decay, u times boost."""
    g = torch.Generator().manual_seed(seed)
    w = torch.linspace(-decay, 3 * decay, shape[2]) / shape[1]
    u = torch.randn(shape[2], generator=g) * boost
    k, v, grad_y = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (w.to(work), u.to(work), k, v), grad_y


def assert_close(results: list[Tensor], truth: list[Tensor], bound: float = 1e-5, floor: float = 0) -> None:
    """Each finite, and within `bound` of the largest expected magnitude, or within `floor`."""
    for name, a, e in zip(NAMES, results, truth, strict=True):
        assert a.isfinite().all(), name
        limit = max(bound, torch.finfo(a.dtype).eps) * e.abs().max().item()  # 16-bit types round their results
        assert (a.double() - e).abs().max().item() <= max(limit, floor), name


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The GPU's phases, compiled for the CPU, where they run one thread after another, in float32."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library, source = tmp_path_factory.mktemp("phases") / "phases.so", Path(__file__).with_name("biwkv4_emulation.cpp")
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def phases(emulation: ctypes.CDLL) -> Kernels:
    return Kernels(emulation.biwkv4_forward, emulation.biwkv4_backward)


@pytest.fixture(params=["cpu", "phases"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that the op runs: those of the CPU, or the GPU's phases on the CPU."""
    if request.param == "phases":
        emulated = request.getfixturevalue("phases")
        monkeypatch.setattr(op, "_kernels", lambda k: emulated)
    return request.param


SHAPES = [
    *((2, length, 5) for length in (1, 2, 3, 31, 32, 33, 64, 65, 200)),
    *((3, length, channels) for length in (5, 70) for channels in (1, 15, 16, 31, 32, 33, 64, 100, 129)),
    *((1, length, 3) for length in (1023, 1024, 1025, 2047, 2048, 2049, 3000, 8160)),  # where kernels change methods
    (1, 65536, 3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, grad_y = draw(shape, dtype)
    assert_close(computed(inputs, grad_y), expected(inputs, grad_y), 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("length", [1, 7, 8, 63, 64, 65, 200, 1500, 4096, 4097, 5000])
def test_lengths_of_the_gpus_phases(length: int, phases: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_kernels", lambda k: phases)
    (w, u, k, v), grad_y = draw((2, length, 3))
    k = torch.stack([k, v], dim=2).flatten(2)[..., :3]  # a view with a stride
    assert_close(computed((w, u, k, v), grad_y), expected((w, u, k, v), grad_y))


@pytest.mark.parametrize("shape", [(2, 200, 35), (1, 4500, 3)])
def test_the_order_of_the_gpus_threads_and_blocks_changes_no_bit(
    shape: tuple[int, int, int], emulation: ctypes.CDLL, phases: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a barrier, or with a race, some order would show it."""
    monkeypatch.setattr(op, "_kernels", lambda k: phases)
    (w, u, k, v), grad_y = draw(shape)
    w[1], u[2] = 300.0 / shape[1], 90.0  # channels beyond the bound
    in_order = computed((w, u, k, v), grad_y)
    for order in (1, 2, 2):  # reversed, and twice at random
        emulation.biwkv4_emulation_order(order)
        other = computed((w, u, k, v), grad_y)
        emulation.biwkv4_emulation_order(0)
        assert_same_bits(in_order, other)


def _peaks(k: Tensor, height: float) -> Tensor:
    k = k.clone()
    for channel in range(k.shape[2]):
        k[:, (7 + 29 * channel) % k.shape[1], channel] = height
    return k


KEYS = {
    "normal": lambda k: k,
    "equal": lambda k: torch.full_like(k, 3.0),
    "equal and low": lambda k: torch.full_like(k, -1e4),
    "all as low as may be": lambda k: torch.full_like(k, torch.finfo(torch.float32).min),
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
    (w, u, k, v), grad_y = draw((1, length, 2))
    return (torch.full_like(w, whole / length), u, KEYS[keys](k), v), grad_y


# A single key of −inf would give 0 / 0.
LENGTHS = (1, 2, 65, 500, 2100, 4500)
EXTREMES = [(keys, length) for keys in KEYS for length in LENGTHS if (keys, length) != ("one at -inf", 1)]


@pytest.mark.parametrize("whole", [-60.0, -3.0, 1.0, 60.0])
@pytest.mark.parametrize(("keys", "length"), EXTREMES)
def test_extreme_keys_and_decays(keys: str, whole: float, length: int, kernels: str) -> None:
    inputs, grad_y = extreme(keys, whole, length)
    # The floor is for terms of order one or more that cancel: a hundredth of their rounding in float32.
    assert_close(computed(inputs, grad_y), expected(inputs, grad_y), floor=1e-9)


BEYOND = [(300.0, 0.0), (-300.0, 0.0), (1e4, 0.0), (5.0, 90.0), (5.0, -90.0)]


@pytest.mark.parametrize("length", [1, 50, 2100, 4500])
@pytest.mark.parametrize(("whole", "boost"), BEYOND)
def test_channels_beyond_the_bound_of_the_fast_kernels(whole: float, boost: float, length: int, kernels: str) -> None:
    (w, u, k, v), grad_y = draw((1, length, 35))
    w[3], u[33] = whole / length, boost
    assert_close(computed((w, u, k, v), grad_y), expected((w, u, k, v), grad_y))


def test_nan_affects_its_own_channel_only() -> None:
    (w, u, k, v), _ = draw((1, 40, 3))
    k[0, 11, 1] = math.nan
    y = biwkv4(w, u, k, v)
    assert y[..., 1].isnan().all()
    assert y[..., [0, 2]].isfinite().all()


@pytest.mark.parametrize("length", [40, 500])
@pytest.mark.parametrize("whole", [-60.0, 1.0, 60.0])
@pytest.mark.parametrize("keys", KEYS)
def test_the_reference_matches_brute_force(keys: str, whole: float, length: int) -> None:
    (w, u, k, v), grad_y = extreme(keys, whole, length)
    inputs = (w.double(), u.double(), k.double(), v.double())
    truth = computed(inputs, grad_y, brute_force)
    assert_close(computed(inputs, grad_y, biwkv4_reference), truth, 1e-8, floor=1e-11)


def assert_same_bits(results: list[Tensor], others: list[Tensor]) -> None:
    for name, a, b in zip(NAMES, results, others, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(2, 300, 40), (1, 3000, 70), (1, 2100, 512)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int]) -> None:
    inputs, grad_y = draw(shape)
    threads = torch.get_num_threads()
    results = []
    for number in (threads, 1, 2, 3):
        torch.set_num_threads(number)
        results.append(computed(inputs, grad_y))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("shape", [(1, 300, 3616), (1, 2048, 544), (1, 2100, 512)])
def test_other_channels_change_no_bit(shape: tuple[int, int, int]) -> None:
    """Large results are stored past the caches, and many strips become whole tasks."""
    (w, u, k, v), grad_y = draw(shape)
    some = slice(32, 64)
    y, dw, du, dk, dv = computed((w, u, k, v), grad_y)
    alone = computed((w[some], u[some], k[..., some], v[..., some]), grad_y[..., some])
    assert_same_bits([y[..., some], dw[some], du[some], dk[..., some], dv[..., some]], alone)


@pytest.mark.parametrize("channels", [24, 32])
@pytest.mark.parametrize("length", [50, 2500])
def test_views_are_not_copied(length: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (w, u, _, _), grad_y = draw((2, length, channels))
    fused = torch.randn(2, length, 3 * channels + 1)
    k, v = fused[..., 1 : 1 + channels], fused[..., 2 * channels :][..., :channels]
    packed = computed((w, u, k.contiguous(), v.contiguous()), grad_y)
    copied = []
    contiguous = Tensor.contiguous
    monkeypatch.setattr(Tensor, "contiguous", lambda x, **_: copied.append(x.shape) or contiguous(x))
    gradients = torch.ops.hpcm.biwkv4_backward(grad_y, w, u, k, v)
    assert_same_bits([biwkv4(w, u, k, v), *gradients], packed)
    assert all(len(shape) == 1 for shape in copied)


def test_channels_that_are_not_contiguous_are_copied() -> None:
    (w, u, k, v), grad_y = draw((2, 50, 8))
    packed = computed((w, u, k, v), grad_y)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v, grad_y)]
    assert_same_bits(computed((w, u, turned[0], turned[1]), turned[2]), packed)
    spread = torch.ones(()).expand(2, 50, 8)
    assert_same_bits(computed((w, u, k, v), spread), computed((w, u, k, v), spread.clone()))


def test_an_empty_batch() -> None:
    (w, u, k, v), grad_y = draw((0, 5, 3))
    results = computed((w, u, k, v), grad_y)
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


def test_the_op_takes_w_in_its_working_type_only() -> None:
    (w, u, k, v), _ = draw((2, 6, 4))
    with pytest.raises(TypeError, match="w must be"):
        torch.ops.hpcm.biwkv4(w.half(), u, k, v)
    assert torch.equal(biwkv4(w.double(), u, k, v), biwkv4(w, u, k, v))
