"""The coding tables of a codec. They are built from its weights and kept in its buffers."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
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
    lowest: np.ndarray
    """(n + 1,) int32, the symbol of each table's first interval."""
    starts: np.ndarray
    """(n + 2,) int64, where each table starts in `cdfs`, and where the last one ends."""
    cdfs: np.ndarray
    """(all tables' entries,) int32. Those of a table increase from 0 to 2¹⁶."""
    first: np.ndarray
    """(n + 1, 256) uint16, the intervals of the values 0, 256, 512 …, where the search for others begins."""

    @classmethod
    def from_buffers(cls, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> "CodingTables":
        """Tables from the codec's buffers (n, longest), (n,) and (n,), as `GeneralizedGaussian.tables` makes them.

        Raises ValueError for others. The coder relies on it.
        """
        if cdfs.dim() != 2 or not cdfs.shape[:1] == lengths.shape == offsets.shape:
            raise ValueError(_NO_TABLES)
        rows, sizes, reach = cdfs.cpu().numpy(), lengths.cpu().numpy(), -offsets.cpu().numpy().astype(np.int64)
        if not ((reach >= 0) & (sizes == 2 * reach + 3) & (sizes <= rows.shape[1])).all():
            raise ValueError(_NO_TABLES)
        uniform = np.arange(0, TOTAL + 1, 256)
        bounds, width = np.concatenate((rows[np.arange(rows.shape[1]) < sizes[:, None]], uniform)), len(uniform)
        sizes = np.append(sizes, width)
        starts = np.append(0, sizes.cumsum(dtype=np.int64))
        begins, ends = bounds[starts[:-1]] == 0, bounds[starts[1:] - 1] == TOTAL
        if not (begins & ends).all() or (np.diff(bounds) > 0).sum() != len(bounds) - len(sizes):
            raise ValueError(_NO_TABLES)
        # The value 256·j lies in the interval that begins with the last bound ≤ 256·j, so with ⌈bound / 256⌉ ≤ j.
        at = np.arange(len(sizes)).repeat(sizes) * width + (bounds + 255) // 256
        counts = np.bincount(at, minlength=len(sizes) * width).reshape(-1, width)
        return cls(
            reach=torch.from_numpy(reach.astype(np.int32)),
            lowest=np.append(-reach, 0).astype(np.int32),
            starts=starts,
            cdfs=bounds.astype(np.int32),
            first=(counts[:, :-1].cumsum(1) - 1).astype(np.uint16),
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
        rows = [[*row.tolist(), TOTAL] for row in np.split(self.cdfs, self.starts[1:-1])]
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
