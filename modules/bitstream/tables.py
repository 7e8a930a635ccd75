"""The coding tables of a codec. They are built from its weights and kept in its buffers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class CodingTables:
    """The range coder's tables of a set of distributions. The last table is the uniform one for bytes."""

    cdfs: list[list[int]]
    lengths: list[int]
    offsets: list[int]
    reach: Tensor
    """(n,) the largest magnitude that each table covers, on the CPU."""

    @classmethod
    def from_buffers(cls, cdfs: Tensor, lengths: Tensor, offsets: Tensor) -> "CodingTables":
        """Tables from the codec's buffers (n, longest), (n,) and (n,)."""
        rows = [row[:length] for row, length in zip(cdfs.tolist(), lengths.tolist(), strict=True)]
        rows.append([*range(0, TOTAL + 1, TOTAL // 256)])
        # The coder takes the last symbol of a table as its own escape. This one has no mass, so it never occurs.
        rows = [[*row, TOTAL] for row in rows]
        return cls(rows, [len(row) for row in rows], [*offsets.tolist(), 0], -offsets.cpu())

    @property
    def byte(self) -> int:
        """Index of the uniform table of bytes."""
        return len(self.offsets) - 1


class Tables(NamedTuple):
    """The tables of z, one for each channel, and those of y, one for each scale of `scales` (60,)."""

    scales: Tensor
    z: CodingTables
    y: CodingTables

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, Tensor]) -> "Tables":
        """The tables in a codec's buffers. Raises RuntimeError if they have not been built."""
        scales, *others = (buffers[name] for name in BUFFERS)
        if not len(scales):
            raise RuntimeError("the coding tables are not built: call update() after loading or training")
        return cls(scales, CodingTables.from_buffers(*others[:3]), CodingTables.from_buffers(*others[3:]))


def built_tables(entropy: GeneralizedGaussian, scales_of_z: Tensor, scale_table: Tensor) -> dict[str, Tensor]:
    """The buffers of z's distributions, of the scales (N,), and of y's tables, of the scales (levels,)."""
    tables = [scale_table, *entropy.tables(scales_of_z.cpu()), *entropy.tables(scale_table.cpu())]
    return dict(zip(BUFFERS, tables, strict=True))
