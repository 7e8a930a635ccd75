"""Choices of coding tables that come out the same wherever a file is decoded.

A symbol's table follows from its scale: the boundaries between tables lie 11 % apart, and a scale next to one may fall
on its other side where a network rounds differently. So the encoder moves the boundaries away from its scales. For each
run of symbols it takes the smallest of 255 offsets that leaves no scale within 2ε of a boundary (ε relative): where
encoder and decoder are each within ε of the exact scales, both choose the same tables, whatever else they compute.

A list of the symbols near a boundary, and the side each is on, would need three to five times the bytes: a position
among hundreds of symbols takes more bits than the smallest free offset of a run with a few of them near a boundary.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modules.file_format import GUARDS_HEAD, BitstreamError, Summary

STEPS = 11

_SPACING = 5
"""Distance of neighboring offsets, in ε: more than the 2 · 2ε that a scale keeps clear, so it blocks one at most."""

_ROUNDING = 3e-7
"""What a moved boundary itself may be off by in float32, relative."""


class Offsets(NamedTuple):
    """How far the boundaries of one step are moved: by one offset a run of 2**`log2_run` symbols."""

    log2_run: int
    values: Tensor
    """(runs,) int8, in units of 5ε in the logarithm of the scale."""

    def pack(self) -> bytes:
        """The logarithm of the run's length, one byte, and one byte a run; 255 alone where nothing moves."""
        return bytes([self.log2_run]) + self.values.numpy().tobytes() if self.values.any() else bytes([_UNMOVED])


_UNMOVED = 255
UNMOVED = Offsets(0, torch.zeros(0, dtype=torch.int8))


@dataclass(frozen=True)
class Guards:
    """What stands before the range coder's bytes: ε, each step's offsets, and checks that tell where sides part."""

    epsilon: float
    offsets: tuple[Offsets, ...]
    checks: tuple[int, ...]
    """CRC-32 of all symbols and tables so far, after each step; before the last step the lower half of it."""

    def pack(self) -> bytes:
        """Their bytes; no list of offsets where none moves anything."""
        packed = b"".join(offsets.pack() for offsets in self.offsets)
        if packed == bytes([_UNMOVED]) * STEPS:
            packed = b""
        return GUARDS_HEAD.pack(0, self.epsilon, len(packed), *self.checks) + packed

    @classmethod
    def parse(cls, string: bytes, symbols: int) -> tuple["Guards", bytes]:
        """Guards and the range coder's bytes, for a latent of so many symbols.

        Raises BitstreamError, before anything is allocated, where the list of offsets is not one of that latent.
        """
        summary = Summary.of(string)
        _, _, length, *checks = GUARDS_HEAD.unpack_from(string)
        packed = string[GUARDS_HEAD.size : GUARDS_HEAD.size + length]
        offsets: list[Offsets] = []
        at = 0
        for size in step_sizes(symbols) if length else ():
            log2_run = packed[at] if at < length else 254
            runs = 0 if log2_run == _UNMOVED else -(-size >> log2_run)
            if 31 < log2_run != _UNMOVED or at + 1 + runs > length:
                raise BitstreamError("damaged: the table offsets are not those of an image of this size")
            values = torch.from_numpy(np.frombuffer(packed[at + 1 : at + 1 + runs], dtype=np.int8).copy())
            offsets.append(Offsets(log2_run, values) if runs else UNMOVED)
            at += 1 + runs
        if at != length:
            raise BitstreamError("damaged: bytes follow the table offsets")
        guards = cls(summary.epsilon, tuple(offsets) or (UNMOVED,) * STEPS, tuple(checks))
        return guards, string[GUARDS_HEAD.size + length :]

    def matches(self, step: int, check: int) -> bool:
        """Whether the CRC-32 after this step is the encoder's."""
        return self.checks[step] == shortened(step, check)

    def index(self, step: int, scales: Tensor, table: Tensor) -> Tensor:
        """Each scale's table."""
        return table_index(moved(scales, self.offsets[step], self.epsilon), table)


def step_sizes(symbols: int) -> tuple[int, ...]:
    """Symbols of each of the eleven steps, for a latent of so many in all."""
    return (symbols // 32,) * 2 + (symbols // 16,) * 3 + (symbols // 8,) * 6


def shortened(step: int, check: int) -> int:
    """The part of the CRC-32 after a step that the file holds."""
    return check if step == STEPS - 1 else check & 0xFFFF


def table_index(scales: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of `table` that is nearest to each scale, by ratio.

    Always rounding up to the next entry would widen scales by 5 % on average. On ten photographs and weights of 1400
    training steps, streams were 0.1 to 0.2 % longer than the likelihoods' estimate with the nearest, and −0.3 to +1.4 %
    off it with the next larger.
    """
    return torch.bucketize(scales, _boundaries(table).to(scales.dtype), out_int32=True)


def moved(scales: Tensor, offsets: Offsets, epsilon: float) -> Tensor:
    """Scales to compare with boundaries in place, instead of the boundaries moved."""
    if not offsets.values.any():
        return scales
    factors = (-_SPACING * epsilon * offsets.values.double()).exp().to(scales.device, scales.dtype)
    run = min(1 << offsets.log2_run, scales.numel())
    by_symbol = factors.repeat_interleave(run)[: scales.numel()]
    return scales * by_symbol.view_as(scales)


def choose_offsets(scales: Tensor, table: Tensor, epsilon: float) -> Offsets:
    """The offsets that leave no scale of a step within 2ε of a boundary, in the longest runs that have one each."""
    if epsilon == 0:
        return UNMOVED
    boundaries = _boundaries(table).double().log()
    spacing = _SPACING * epsilon
    most = min(127, int(boundaries.diff().min() / 4 / spacing))
    if most < 1:
        raise ValueError(f"ε = {epsilon} is too large for a scale table as dense as this one")
    away, _ = nearest_boundary(scales.flatten(), table)
    nearest = (away / spacing).round()
    blocked = ((away - nearest * spacing).abs() <= 2 * epsilon + _ROUNDING) & (nearest.abs() <= most)
    symbols, candidates = blocked.nonzero().flatten().cpu(), (nearest[blocked].long() + most).cpu()
    order = _by_size(most)
    count = scales.numel()
    for log2_run in range((count - 1).bit_length(), -1, -1):
        taken = torch.zeros(-(-count >> log2_run), 2 * most + 1, dtype=torch.bool)
        taken[symbols >> log2_run, candidates] = True
        free = ~taken[:, order]
        if free.any(1).all():
            break
    # Of one symbol alone, one offset is blocked at most: the loop ends with a free one for each run.
    return Offsets(log2_run, (order[free.int().argmax(1)] - most).to(torch.int8))


def nearest_boundary(scales: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """How far each scale is above the nearest boundary, as a difference of logarithms, and that boundary's index."""
    boundaries = _boundaries(table).double().log()
    logs = scales.double().clamp_min(1e-30).log()
    index = torch.bucketize(logs, (boundaries[1:] + boundaries[:-1]) / 2)
    return logs - boundaries[index], index


def _boundaries(table: Tensor) -> Tensor:
    return (table[1:] * table[:-1]).sqrt()


@lru_cache(maxsize=4)
def _by_size(most: int) -> Tensor:
    """Positions of the offsets −most … most, from the smallest to the largest."""
    return torch.tensor(sorted(range(2 * most + 1), key=lambda position: (abs(position - most), position)))


def scale_error(scales: Tensor, exact: Tensor, table: Tensor) -> Tensor:
    """Relative error of each scale that decides anything: not of those below all boundaries or above, by a tenth."""
    boundaries = _boundaries(table).double()
    scales, exact = scales.double().cpu(), exact.double().cpu()
    decides = (exact > 0.9 * float(boundaries[0])) & (exact < 1.1 * float(boundaries[-1]))
    return ((scales - exact) / exact)[decides].abs()
