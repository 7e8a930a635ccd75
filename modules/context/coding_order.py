"""The order in which the latent is coded: three scales, eleven steps (HPCM, ICCV 2025, section 3.2).

In channels-last layout a latent (B, M, H, W) is a list of *rows*: row p·8 + e holds eighth e of the channels at
position p (reading order). The scales' grids, the steps' masks and the change from one scale to the next all move
whole rows, so each is one precomputed index. A tensor of 2M channels (scales, then means) has rows p·16 + half·8 + e.

This file needs nothing but PyTorch. `hpcm export` copies it into a folder of exported programs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

EIGHTHS = 8

# For each eighth of the channels, its (row, column) in a 2×2 cell: of y's grid (s2 from y), then of the s2 grid
# (s1 from s2).
_S2_OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 1), (1, 0))
_S1_OFFSETS = ((0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1))

# For each step, the channel group that each position of a 2×2 cell codes: halves on s1, quarters on s2.
_S1_STEPS = (((0, 1), (1, 0)), ((1, 0), (0, 1)))
_S2_STEPS = (((3, 2), (1, 0)), ((2, 3), (0, 1)), ((1, 0), (3, 2)))

# s3 codes in 4×4 cells: the pattern that each position belongs to, and the pattern of each eighth in each step.
_S3_PATTERNS = ((0, 4, 1, 5), (6, 2, 7, 3), (1, 5, 0, 4), (7, 3, 6, 2))
_S3_EIGHTHS = ("24603571", "35712460", "46025713", "57134602", "60247135", "71356024")
_S3_STEPS = tuple(
    tuple(tuple(eighths.index(str(pattern)) for pattern in line) for line in _S3_PATTERNS) for eighths in _S3_EIGHTHS
)
_STEPS = (_S1_STEPS, _S2_STEPS, _S3_STEPS)

# The published weights were trained with these adaptors in this order.
_ADAPTORS = ((None, 0), (2, 0, 1), (5, 0, 1, 2, 3, 4))


@dataclass(frozen=True)
class Step:
    """One coding step. Its rows are in order of position, so they reshape to (B, h, w, channels of a group)."""

    rows: Tensor
    """(R,) the rows of y that this step codes."""
    local: Tensor
    """(R,) the same rows on the step's own grid."""
    parameters: Tensor
    """(2R,) the rows of the step's scales, then of its means, in a 2M-channel tensor of its grid."""
    number: int
    """0 to 10."""
    scale: int
    """The scale that the step belongs to, 0 (coarsest) to 2."""
    adaptor: int | None
    """Index into the scale's adaptors. None in step 0, whose scales and means come from the hyper-prior directly."""


@dataclass(frozen=True)
class Scale:
    """One grid of the hierarchy."""

    height: int
    width: int
    context: Tensor
    """(16·h·w,) for each row of the initial context, its source row in (coarser context, hyper-prior)."""
    coarser: Tensor
    """(R,) the rows of this grid that the coarser scale has coded; empty for s1."""
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Hierarchy:
    """The three scales, coarse to fine, for one latent size."""

    scales: tuple[Scale, Scale, Scale]
    restore: Tensor
    """(8·H·W,) the index that brings the concatenated rows of all steps into the order of y."""


CodeStep = Callable[[Step, Tensor, Tensor], Tensor]
"""Codes the rows of a step from their scales and means, each (B, R, M/8), and returns ŷ of these rows."""


class ContextModel(Protocol):
    """Predicts the scales and means of each step from everything that is coded before it."""

    def fuse(self, scale: int, context: Tensor) -> Tensor:
        """The first context of scale 1 or 2 from the coarser context and the hyper-prior, both (B, 2M, h, w)."""

    def predict(self, step: Step, context: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and means of a step that has an adaptor, and the context of the next step, both (B, 2M, h, w).

        `context` is (B, 2M, h, w). `y_hat` (B, M, h, w) holds what is coded on this grid, and 0 elsewhere. The context
        after the last step is not used, so any tensor may be returned for it.
        """


def walk(model: ContextModel, hyper: Tensor, code: CodeStep) -> Tensor:
    """Run `code` on each step in order. Maps hyper (B, 2M, h, w), from h_s, to ŷ (B, M, h, w)."""
    eighth = hyper.shape[1] // (2 * EIGHTHS)
    hyper_rows = to_rows(hyper, eighth)
    context_rows = y_rows = hyper_rows[:, :0]
    for number, scale in enumerate(hierarchy(*hyper.shape[2:], hyper.device).scales):
        size = scale.height, scale.width
        context = from_rows(torch.cat((context_rows, hyper_rows), dim=1).index_select(1, scale.context), *size)
        if number > 0:
            context = model.fuse(number, context)
        empty = hyper.new_zeros(len(hyper), size[0] * size[1] * EIGHTHS, eighth)
        y_rows = empty.index_copy(1, scale.coarser, y_rows)
        parameters = context
        for step in scale.steps:
            if step.adaptor is not None:
                parameters, context = model.predict(step, context, from_rows(y_rows, *size))
            scales, means = to_rows(parameters, eighth).index_select(1, step.parameters).chunk(2, dim=1)
            y_rows = y_rows.index_copy(1, step.local, code(step, scales, means))
        context_rows = to_rows(context, eighth)
    return from_rows(y_rows, *size)


def to_rows(x: Tensor, channels: int) -> Tensor:
    """View (B, C, H, W), channels-last, as rows (B, H·W·C/channels, channels)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


def from_rows(rows: Tensor, height: int, width: int) -> Tensor:
    """View rows (B, R, c) as the channels-last tensor (B, R·c/(H·W), H, W)."""
    return rows.reshape(rows.shape[0], height, width, -1).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def hierarchy(height: int, width: int, device: torch.device) -> Hierarchy:
    """The index tables of a latent of height × width, both multiples of 8. Cached per size and device."""
    # Autograd cannot save a tensor that was made in inference mode.
    with torch.inference_mode(False):
        return _build(height, width, device)


def _build(height: int, width: int, device: torch.device) -> Hierarchy:
    sizes = [(height >> shift, width >> shift) for shift in (2, 1, 0)]
    s2_in_y = _polyphase(*sizes[1], _S2_OFFSETS)
    s1_in_s2 = _polyphase(*sizes[0], _S1_OFFSETS)
    rows_in_y = (s2_in_y[s1_in_s2], s2_in_y, torch.arange(height * width * EIGHTHS))
    coarser = (torch.empty(0, dtype=torch.long), s1_in_s2, s2_in_y)
    coded_on_s2 = torch.zeros(len(rows_in_y[2]), dtype=torch.bool)
    coded_on_s2[s2_in_y] = True
    uncoded = (~coded_on_s2).nonzero().flatten()
    hyper_fill = (
        (torch.arange(len(rows_in_y[0])), torch.arange(len(rows_in_y[0]))),
        _misplaced_hyper_rows(*sizes[1]),
        (uncoded, uncoded),
    )

    scales: list[Scale] = []
    for index, (h, w) in enumerate(sizes):
        source, destination = hyper_fill[index]
        first = sum(len(scale.steps) for scale in scales)
        steps = []
        for number, (cell, adaptor) in enumerate(zip(_STEPS[index], _ADAPTORS[index], strict=True), start=first):
            local, parameters = _rows_of_step(_tile(cell, h, w), max(map(max, cell)) + 1)
            rows, local, parameters = (x.to(device) for x in (rows_in_y[index][local], local, parameters))
            steps.append(Step(rows, local, parameters, number, index, adaptor))
        context = torch.full((len(rows_in_y[index]) * 2,), -1, dtype=torch.long)
        coded = _both_halves(coarser[index])
        context[coded] = torch.arange(len(coded))
        context[_both_halves(destination)] = len(coded) + _both_halves(rows_in_y[index][source])
        scales.append(Scale(h, w, context.to(device), coarser[index].to(device), tuple(steps)))

    order = torch.cat([step.rows for scale in scales for step in scale.steps])
    return Hierarchy((scales[0], scales[1], scales[2]), torch.argsort(order))


def _polyphase(h: int, w: int, offsets: tuple[tuple[int, int], ...]) -> Tensor:
    """Rows of the 2h × 2w grid that make up the h × w grid, in the order of its rows."""
    row, column = torch.tensor(offsets).unbind(1)
    y = 2 * torch.arange(h)[:, None, None] + row
    x = 2 * torch.arange(w)[None, :, None] + column
    return ((y * 2 * w + x) * EIGHTHS + torch.arange(EIGHTHS)).flatten()


def _both_halves(rows: Tensor) -> Tensor:
    """The same rows of a 2M-channel tensor: each eight of them among the scales, then among the means."""
    scales = (rows // EIGHTHS * (2 * EIGHTHS) + rows % EIGHTHS).view(-1, EIGHTHS)
    return torch.stack((scales, scales + EIGHTHS), dim=1).flatten()


def _misplaced_hyper_rows(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Source and destination rows of the hyper-prior on the s2 grid. They differ, as they do in the official code.

    Within a channel, the source skips one position of each 2×2 cell. Its values, in reading order, fill the positions
    that s1 has not coded, in reading order. The published weights depend on this order.
    """
    cell = (torch.arange(h)[:, None] % 2 * 2 + torch.arange(w) % 2).flatten()
    position = torch.arange(h * w)
    pairs = []
    for eighth in range(EIGHTHS):
        source = position[cell != (0 if eighth < 4 else 1)]
        destination = position[cell != eighth // 2]
        pairs.append((source * EIGHTHS + eighth, destination * EIGHTHS + eighth))
    sources, destinations = zip(*pairs, strict=True)
    return torch.cat(sources), torch.cat(destinations)


def _tile(cell: tuple[tuple[int, ...], ...], h: int, w: int) -> Tensor:
    """The channel group that each position codes, (h·w,)."""
    pattern = torch.tensor(cell)
    side = len(cell)
    return pattern[torch.arange(h)[:, None] % side, torch.arange(w) % side].flatten()


def _rows_of_step(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rows of the positions' channel groups on their grid, (R,), and of their scales and means, (2R,)."""
    eighths = EIGHTHS // groups
    first = torch.arange(len(group)) * EIGHTHS + group * eighths
    local = (first[:, None] + torch.arange(eighths)).flatten()
    scales = local // EIGHTHS * (2 * EIGHTHS) + local % EIGHTHS
    return local, torch.cat((scales, scales + EIGHTHS))
