"""The coding tables of a codec. They are built from its weights and kept in its buffers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modules.layers.entropy import GeneralizedGaussian

BUFFERS = (
    "scale_table",
    "quantized_cdf_z",
    "cdf_length_z",
    "offset_z",
    "quantized_cdf_y",
    "cdf_length_y",
    "offset_y",
)
"""Names of the buffers, as in the published checkpoints."""

TOTAL = 2**16
"""Frequencies of a table's symbols sum to this."""

_NO_TABLES = "the coding tables are not those of a codec: call update() to build them from its weights"


@dataclass(frozen=True, eq=False)
class CodingTables:
    """The range coder's n tables of a set of distributions, and then the uniform one for bytes. On the CPU.

    A table divides the values below 2¹⁶ into intervals: one for each symbol from −reach to reach, and one for the
    escape symbol.
    """

    reach: Tensor
    """(n,) int32, the largest magnitude in each table."""
    lowest: Tensor
    """(n + 1,) int32, the symbol of each table's first interval."""
    starts: Tensor
    """(n + 2,) int64, where each table starts in `cdfs`, and where the last one ends."""
    cdfs: Tensor
    """(all tables' entries,) int32. Those of a table increase from 0 to 2¹⁶."""
    first: Tensor
    """(n + 1, 256) uint16, the intervals of the values 0, 256, 512 …, where the search for others begins."""

    @classmethod
    def from_buffers(cls, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> "CodingTables":
        """Tables from the codec's buffers (n, longest), (n,) and (n,), as `GeneralizedGaussian.tables` makes them.

        Raises ValueError for others. The coder relies on it.
        """
        cdfs, lengths, reach = cdfs.cpu(), lengths.cpu().long(), -offsets.cpu().long()
        if cdfs.dim() != 2 or not cdfs.shape[:1] == lengths.shape == reach.shape:
            raise ValueError(_NO_TABLES)
        if not ((reach >= 0) & (lengths == 2 * reach + 3) & (lengths <= cdfs.shape[1])).all():
            raise ValueError(_NO_TABLES)
        inside = torch.arange(cdfs.shape[1]) < lengths[:, None]
        uniform = torch.arange(0, TOTAL + 1, 256)
        bounds, width = torch.cat((cdfs[inside], uniform)), len(uniform)
        lengths = torch.cat((lengths, torch.tensor([width])))
        starts = torch.cat((torch.tensor([0]), lengths.cumsum(0)))
        begins, ends = bounds[starts[:-1]] == 0, bounds[starts[1:] - 1] == TOTAL
        if not (begins & ends).all() or int((bounds.diff() > 0).sum()) != len(bounds) - len(lengths):
            raise ValueError(_NO_TABLES)
        # The value 256·j lies in the interval that begins with the last bound ≤ 256·j, so with ⌈bound / 256⌉ ≤ j.
        number = torch.arange(len(lengths)).repeat_interleave(lengths)
        at = torch.bincount(width * number + (bounds + 255) // 256, minlength=width * len(lengths)).view(-1, width)
        return cls(
            reach=reach.int(),
            lowest=torch.cat((-reach, torch.tensor([0]))).int(),
            starts=starts,
            cdfs=bounds.int(),
            first=(at[:, :-1].cumsum(1) - 1).to(torch.uint16),
        )

    @property
    def byte(self) -> int:
        """Index of the uniform table of bytes."""
        return len(self.reach)

    @functools.cached_property
    def lists(self) -> tuple[list[list[int]], list[int], list[int]]:
        """CDF, its length and the lowest symbol of each table, as CompressAI's coder takes them.

        It takes a table's last symbol as its own escape. Here that one has no mass, so it never occurs.
        """
        rows = [[*row.tolist(), TOTAL] for row in self.cdfs.split(self.starts.diff().tolist())]
        return rows, [len(row) for row in rows], self.lowest.tolist()


class Tables(NamedTuple):
    """The tables of z, one for each channel, and those of y, one for each scale of `scales` (60,)."""

    scales: Tensor
    z: CodingTables
    y: CodingTables

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, Tensor]) -> "Tables":
        """The tables in a codec's buffers. Raises RuntimeError for none and ValueError for invalid ones."""
        scales, *others = (buffers[name] for name in BUFFERS)
        if not len(scales):
            raise RuntimeError("the coding tables are not built: call update() after loading or training")
        tables = cls(scales, CodingTables.from_buffers(*others[:3]), CodingTables.from_buffers(*others[3:]))
        if scales.shape != tables.y.reach.shape:
            raise ValueError(_NO_TABLES)
        return tables


def built_tables(entropy: GeneralizedGaussian, scales_of_z: Tensor, scale_table: Tensor) -> dict[str, Tensor]:
    """The buffers of z's distributions, of the scales (N,), and of y's tables, of the scales (levels,)."""
    tables = [scale_table, *entropy.tables(scales_of_z.cpu()), *entropy.tables(scale_table.cpu())]
    return dict(zip(BUFFERS, tables, strict=True))
