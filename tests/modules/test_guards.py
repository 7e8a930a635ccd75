"""Two machines choose the same tables: boundaries are kept away from scales, and wrong lists are refused."""

import math
import struct

import pytest
import torch
from torch import Tensor

from modules.bitstream.file_format import (
    EPSILON,
    LEAST_EPSILON,
    MOST_EPSILON,
    BitstreamError,
    LatentHeader,
    check_epsilon,
)
from modules.bitstream.guards import (
    STEPS,
    UNMOVED,
    Guards,
    Offsets,
    choose_offsets,
    moved,
    nearest_boundary,
    step_sizes,
    table_index,
)
from modules.context.coding_order import hierarchy
from modules.layers.entropy import TAIL_MASS, _standard_cdf, quantile, scale_table

TABLE = scale_table()
SYMBOLS = 4096


def log_uniform(count: int) -> Tensor:
    return torch.exp(torch.empty(count).uniform_(math.log(0.1), math.log(80)))


def crowded(count: int) -> Tensor:
    """Scales of which half lie within a thousandth of one boundary, as in flat regions of an image."""
    boundary = (TABLE[10] * TABLE[11]).sqrt()
    near = boundary * (1 + torch.empty(count // 2).uniform_(-1e-3, 1e-3))
    return torch.cat((near, log_uniform(count - count // 2)))[torch.randperm(count)]


@pytest.mark.parametrize("epsilon", [LEAST_EPSILON, 1e-5, EPSILON, 1e-4, 1e-3, MOST_EPSILON])
@pytest.mark.parametrize("scales_of", [log_uniform, crowded])
def test_encoder_and_decoder_within_epsilon_choose_the_same_tables(epsilon: float, scales_of) -> None:
    exact = scales_of(6001).double()
    encoder, decoder = (exact * (1 + epsilon * (2 * torch.rand_like(exact) - 1)) for _ in range(2))
    offsets = choose_offsets(encoder.float(), TABLE, epsilon)
    chosen = [table_index(moved(scales.float(), offsets, epsilon), TABLE) for scales in (encoder, decoder)]
    assert torch.equal(*chosen)
    away, _ = nearest_boundary(moved(encoder.float(), offsets, epsilon), TABLE)
    assert away.abs().min() > 2 * epsilon
    if epsilon >= 1e-4 or (scales_of is crowded and epsilon >= 1e-5):  # The test could fail: unmoved, they part.
        assert not torch.equal(*(table_index(scales.float(), TABLE) for scales in (encoder, decoder)))


def test_offsets_leave_the_tables_nearly_as_they_are() -> None:
    scales = log_uniform(20_000)
    offsets = choose_offsets(scales, TABLE, EPSILON)
    shift = (moved(scales, offsets, EPSILON) / scales).log().abs()
    assert 0 < shift.max() <= 127 * 5 * EPSILON + 1e-6
    assert len(offsets.values) < 20_000 * EPSILON * 60  # a byte for more than two scales that were near a boundary


@pytest.mark.parametrize("scales", [torch.zeros(64), torch.full((64,), -1.0), torch.full((64,), float("nan"))])
def test_zero_negative_and_nan_scales_have_a_table(scales: Tensor) -> None:
    offsets = choose_offsets(scales, TABLE, EPSILON)
    assert table_index(moved(scales, offsets, EPSILON), TABLE).shape == (64,)


def test_an_epsilon_of_zero_moves_nothing() -> None:
    assert choose_offsets(crowded(100), TABLE, 0) == UNMOVED
    assert moved(TABLE, UNMOVED, 0) is TABLE


def test_step_sizes_are_those_of_the_hierarchy() -> None:
    steps = [step for scale in hierarchy(16, 24, torch.device("cpu")).scales for step in scale.steps]
    assert step_sizes(48 * 16 * 24) == tuple(6 * len(step.rows) for step in steps)


def some_guards() -> Guards:
    offsets = [UNMOVED] * STEPS
    offsets[1] = Offsets(7, torch.tensor([-128], dtype=torch.int8))
    offsets[10] = Offsets(6, torch.arange(8, dtype=torch.int8))
    return Guards(EPSILON, tuple(offsets), (*range(STEPS - 1), 2**32 - 1))


def test_the_bytes_are_the_documented_ones() -> None:
    packed = some_guards().pack()
    offsets = bytes([255, 7, 128, *[255] * 8, 6, *range(8)])
    assert packed == struct.pack("<BfI10HI", 0, EPSILON, len(offsets), *range(10), 2**32 - 1) + offsets
    parsed, rest = Guards.parse(packed + b"coded", SYMBOLS)
    assert rest == b"coded"
    assert parsed.pack() == packed
    assert parsed.epsilon == pytest.approx(EPSILON)
    assert LatentHeader.of(packed) == (parsed.epsilon, len(offsets))
    assert len(Guards(0, (UNMOVED,) * STEPS, (0,) * STEPS).pack()) == 33


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head[:32], "does not start with a head of 33"),
        (lambda head: b"\1" + head[1:], "does not start with a head of 33"),
        (lambda head: head[:1] + struct.pack("<f", float("nan")) + head[5:], "ε = nan"),
        (lambda head: head[:1] + struct.pack("<f", -1) + head[5:], r"ε = -1\.0"),
        (lambda head: head[:1] + struct.pack("<f", 1) + head[5:], r"ε = 1\.0"),
        (lambda head: head[:5] + b"\xff" * 4 + head[9:], "4294967295 bytes of table offsets"),
        (lambda head: head[:5] + struct.pack("<I", 5) + head[9:], "not those of an image of this size"),
        (lambda head: head[:33] + bytes([0]) + head[34:], "not those of an image of this size"),
        (lambda head: head[:33] + bytes([40]) + head[34:], "not those of an image of this size"),
        (lambda head: head[:44] + bytes([255]) + head[45:], "bytes follow the table offsets"),
    ],
)
def test_offsets_that_do_not_fit_are_refused(change, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        Guards.parse(change(some_guards().pack()), SYMBOLS)


def test_offsets_for_another_size_are_refused() -> None:
    with pytest.raises(BitstreamError, match="not those of an image of this size"):
        Guards.parse(some_guards().pack(), 4 * SYMBOLS)


@pytest.mark.parametrize("epsilon", [-1e-5, 1e-7, 0.1, float("nan")])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"it must be 0 or 1e-06 to 0\.005"):
        check_epsilon(epsilon)


def test_coding_tables_do_not_depend_on_the_last_bits_of_float64_functions() -> None:
    """Each rounded value on the way to a table is a million times further from a tie than the error of float64."""
    exact = [math.exp(math.log(0.12) + (math.log(64) - math.log(0.12)) * level / 59) for level in range(60)]
    ulps = [abs(value - float(entry)) / math.ulp(value) for value, entry in zip(exact, TABLE, strict=True)]
    assert max(ulps) < 2**28 * (1 - 1e-6)  # float32's half step in steps of float64
    reach = TABLE.double().clamp_min(0.12) * quantile(1.5, TAIL_MASS / 2)
    assert (reach - reach.round()).abs().min() > 1e-6
    for scale, c in zip(TABLE.double().clamp_min(0.12), reach.ceil().int().tolist(), strict=True):
        symbols = torch.arange(-c, c + 1, dtype=torch.float64)
        upper, lower = (_standard_cdf((symbols + side) / scale, 1.5) for side in (0.5, -0.5))
        mass = upper - lower
        mass = torch.cat((mass, (1 - mass.sum()).clamp_min(0)[None])) * 2**16
        assert ((mass % 1) - 0.5).abs().min() > 1e-6
