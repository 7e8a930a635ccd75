"""Version 1 of the file format: still read where it was written, no longer written.

It trusted encoder and decoder to compute the same: y began with the number of threads that the encoder ran, its scales
chose their tables unguarded, and the scales that have a table were rounded as the machine rounds.
"""

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.determinism import MOST_THREADS
from modules.entropy import SCALE_BOUND, GeneralizedGaussian
from modules.guards import table_index
from modules.hierarchy import Step
from modules.rans import BitstreamError, CodingTables, SymbolReader, split_check

if TYPE_CHECKING:
    from modules.codec import HPCM


class Decoder:
    """Reads each step's symbols and trusts its own scales."""

    def __init__(self, scale_table: Tensor, reader: SymbolReader):
        self.scale_table, self.reader = scale_table, reader

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Decode (1, R, M/8) rows; returns ŷ there."""
        return self.reader.take(table_index(scales, self.scale_table)) + means


def wrote(y: bytes) -> bool:
    """Whether a coded latent is version 1's: later ones begin with a byte of 0."""
    return y[:1] != b"\0"


def threads(y: bytes) -> int | None:
    """How many threads coded this latent, None if it is not version 1's; raises BitstreamError for none or too many."""
    if not wrote(y):
        return None
    count = y[0] if y else 0
    if not 1 <= count <= MOST_THREADS:
        raise BitstreamError(f"coded with {count} threads: damaged, or from a machine with more than {MOST_THREADS}")
    return count


def decode_y(model: "HPCM", y: bytes, z_hat: Tensor) -> Tensor:
    """ŷ (1, M, h, w); raises BitstreamError for what this model, on this machine and build, did not write."""
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
