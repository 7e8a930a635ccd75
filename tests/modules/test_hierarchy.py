"""The row indices against a plain reading of the official masks."""

import pytest
import torch
from torch import Tensor

from modules.context.coding_order import EIGHTHS, from_rows, hierarchy, to_rows

CPU = torch.device("cpu")
OFFSETS = [(0, 0), (1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 1), (1, 0)]
S3_CELLS = [
    {(0, 0), (2, 2)}, {(0, 2), (2, 0)}, {(1, 1), (3, 3)}, {(1, 3), (3, 1)},
    {(0, 1), (2, 3)}, {(0, 3), (2, 1)}, {(1, 0), (3, 2)}, {(1, 2), (3, 0)},
]  # fmt: skip
S3_TABLE = ["24603571", "35712460", "46025713", "57134602", "60247135", "71356024"]


def s2_of(y: Tensor) -> Tensor:
    """Polyphase component of each eighth of the channels."""
    groups = y.chunk(8, dim=1)
    return torch.cat([group[:, :, r::2, c::2] for group, (r, c) in zip(groups, OFFSETS, strict=True)], dim=1)


def s1_of(s2: Tensor) -> Tensor:
    """Polyphase component of each quarter of the channels."""
    offsets = [(0, 0), (0, 1), (1, 0), (1, 1)]
    return torch.cat([g[:, :, r::2, c::2] for g, (r, c) in zip(s2.chunk(4, dim=1), offsets, strict=True)], dim=1)


def mask(group_cells: list[set[tuple[int, int]]], cell: int, h: int, w: int) -> Tensor:
    """Boolean (channels = groups, h, w): whether a position of a group is coded."""
    return torch.tensor(
        [[[(i % cell, j % cell) in cells for j in range(w)] for i in range(h)] for cells in group_cells]
    )


def step_masks(scale: int, h: int, w: int) -> list[Tensor]:
    """Masks of the official tables, (8, h, w) by eighth of the channels."""
    if scale == 0:
        diagonal, other = {(0, 0), (1, 1)}, {(0, 1), (1, 0)}
        return [mask([a] * 4 + [b] * 4, 2, h, w) for a, b in ((diagonal, other), (other, diagonal))]
    if scale == 1:
        cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
        return [
            mask([{cells[c]} for c in step for _ in range(2)], 2, h, w)
            for step in ((3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2))
        ]
    return [mask([S3_CELLS[int(pattern)] for pattern in step], 4, h, w) for step in S3_TABLE]


@pytest.fixture
def numbered() -> Tensor:
    """A latent whose values are all different, (1, 16, 16, 24)."""
    return torch.arange(16 * 16 * 24, dtype=torch.float64).view(1, 16, 16, 24)


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_steps_code_the_positions_of_their_masks(scale: int, numbered: Tensor) -> None:
    plan = hierarchy(16, 24, CPU).scales[scale]
    grid = [s1_of(s2_of(numbered)), s2_of(numbered), numbered][scale]
    for step, expected in zip(plan.steps, step_masks(scale, plan.height, plan.width), strict=True):
        channels = expected.repeat_interleave(2, dim=0)
        coded = torch.zeros(1, len(to_rows(grid, 2)[0]), 2, dtype=grid.dtype)
        coded.index_copy_(1, step.local, to_rows(grid, 2).index_select(1, step.local) + 1)
        assert torch.equal(from_rows(coded, plan.height, plan.width), torch.where(channels, grid + 1, 0))
        assert torch.equal(
            to_rows(numbered, 2).index_select(1, step.rows), to_rows(grid, 2).index_select(1, step.local)
        )


def test_every_row_is_coded_once() -> None:
    plan = hierarchy(16, 24, CPU)
    coded = torch.cat([step.rows for scale in plan.scales for step in scale.steps])
    assert torch.equal(coded.sort().values, torch.arange(16 * 24 * EIGHTHS))
    assert torch.equal(coded[plan.restore], torch.arange(16 * 24 * EIGHTHS))


def test_hyper_prior_has_the_official_order_on_s2() -> None:
    plan, hyper = hierarchy(16, 24, CPU).scales[1], torch.randn(1, 32, 16, 24)
    s1_context = torch.randn(1, 32, 4, 6)
    rows = torch.cat((to_rows(s1_context, 2), to_rows(hyper, 2)), 1)
    context = from_rows(rows.index_select(1, plan.context), 8, 12)
    cell = torch.arange(8)[:, None] % 2 * 2 + torch.arange(12) % 2
    for half, source, coded in zip(context.chunk(2, 1), hyper.chunk(2, 1), s1_context.chunk(2, 1), strict=True):
        s2 = s2_of(source)
        for channel in range(16):
            eighth, quarter = channel // 2, channel // 4
            values = s2[0, channel][cell != (0 if eighth < 4 else 1)]
            assert torch.equal(half[0, channel][cell != quarter], values)
            assert torch.equal(half[0, channel][cell == quarter], coded[0, channel].flatten())


def test_tables_built_in_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        plan = hierarchy(40, 40, CPU)
    assert hierarchy(40, 40, CPU) is plan
    x = torch.randn(1, 40 * 40 * EIGHTHS, 2, requires_grad=True)
    x.index_select(1, plan.restore).sum().backward()
    assert x.grad is not None
