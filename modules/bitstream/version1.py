"""Version 1 of the file format. It is still read on the machine that wrote it, and no longer written.

It relied on encoder and decoder computing the same values. y began with the encoder's number of threads. The scales
chose their tables without guards. The scales of the tables themselves were rounded as the machine rounds.
"""

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.bitstream.determinism import MOST_THREADS
from modules.bitstream.guards import table_index
from modules.bitstream.rans import BitstreamError, CodingTables, SymbolReader, split_check
from modules.context.coding_order import Step
from modules.layers.entropy import SCALE_BOUND, GeneralizedGaussian

if TYPE_CHECKING:
    from modules.codec import HPCM


class Decoder:
    """Reads each step's symbols and trusts its own scales."""

    def __init__(self, scale_table: Tensor, reader: SymbolReader):
        self.scale_table, self.reader = scale_table, reader

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode the step's rows, (1, R, M/8); returns ŷ of these rows."""
        return self.reader.take(table_index(scales, self.scale_table)) + means


def wrote(y: bytes) -> bool:
    """Whether a coded latent is of version 1. Later versions begin with a byte of 0."""
    return y[:1] != b"\0"


def threads(y: bytes) -> int | None:
    """Number of threads that coded a latent; None if it is not of version 1. Raises BitstreamError if out of range."""
    if not wrote(y):
        return None
    count = y[0] if y else 0
    if not 1 <= count <= MOST_THREADS:
        raise BitstreamError(f"coded with {count} threads: damaged, or from a machine with more than {MOST_THREADS}")
    return count


def decode_y(model: "HPCM", y: bytes, z_hat: Tensor) -> Tensor:
    """ŷ (1, M, h, w). Raises BitstreamError if this model, on this machine and build, did not write `y`."""
    scale_table, tables = _tables()
    check, coded = split_check(y[1:])
    reader = SymbolReader(coded, tables, model.config.M * 16 * z_hat.shape[2] * z_hat.shape[3])
    y_hat = model.walk(model.h_s(z_hat), Decoder(scale_table.to(z_hat.device), reader))
    reader.finish(check)
    return y_hat


@cache
def _tables() -> tuple[Tensor, CodingTables]:
    scale_table = torch.exp(torch.linspace(math.log(SCALE_BOUND), math.log(64.0), 60))
    return scale_table, CodingTables.from_buffers(*GeneralizedGaussian().tables(scale_table))
