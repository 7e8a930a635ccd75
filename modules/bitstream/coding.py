"""Codes one image to the strings of y and z, and back. Decoding finds differences between machines and recovers."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from modules.bitstream import version1
from modules.bitstream.coders import Decoder, Encoder, RecordingDecoder, StepMismatch
from modules.bitstream.determinism import coding_arithmetic
from modules.bitstream.guards import Guards
from modules.bitstream.rans import CodingTables, RewindingReader, SymbolReader, SymbolWriter, split_check
from modules.bitstream.recovery import RecoveringDecoder, in_float64
from modules.context.coding_order import to_rows

if TYPE_CHECKING:
    from modules.codec import HPCM


class Tables(NamedTuple):
    """The range coder's tables."""

    y: CodingTables
    z: CodingTables

    @classmethod
    def of(cls, model: "HPCM") -> "Tables":
        """The tables of a model. Raises RuntimeError if it has not built them."""
        if not len(model.scale_table):
            raise RuntimeError("the coding tables are not built: call update() after loading or training")
        return cls(
            CodingTables.from_buffers(model.quantized_cdf_y, model.cdf_length_y, model.offset_y),
            CodingTables.from_buffers(model.quantized_cdf_z, model.cdf_length_z, model.offset_z),
        )


class Walk(NamedTuple):
    """The scales that a decoder computes for y and the symbols that it reads, both (symbols,), in coding order."""

    scales: Tensor
    symbols: Tensor


class Decoded(NamedTuple):
    """An image (1, 3, H, W) in [0, 1], and how it was recovered; "" if no recovery was needed."""

    x_hat: Tensor
    recovery: str


def encode(model: "HPCM", image: Tensor, tables: Tables, epsilon: float) -> tuple[bytes, bytes]:
    """The strings of y and z of a padded image (1, 3, H, W) in [0, 1]. `modules.bitstream.guards` explains ε."""
    with coding_arithmetic(image.device):
        y = model.g_a(image)
        z_writer, y_writer = SymbolWriter(tables.z), SymbolWriter(tables.y)
        z = model.h_a(y)
        z_hat = z_writer.put((z - model.means_hyper).round(), _z_indexes(z)) + model.means_hyper
        encoder = Encoder(to_rows(y, model.config.M // 8), model.scale_table, y_writer, epsilon)
        model.walk(model.h_s(z_hat), encoder)
    return encoder.guards.pack() + y_writer.coded(), z_writer.string()


def decode(model: "HPCM", y: bytes, z: bytes, shape: tuple[int, int], tables: Tables) -> Decoded:
    """The image of this shape. Raises BitstreamError for strings of another model, and if recovery fails."""
    recovery = ""
    with coding_arithmetic(model.means_hyper.device, version1.threads(y)):
        z_hat = _decode_z(model, z, shape, tables.z)
        if version1.wrote(y):
            y_hat = version1.decode_y(model, y, z_hat)
        else:
            y_hat, recovery = _decode_y(model, y, z_hat, tables.y)
        x_hat = model.g_s(y_hat)[:, :, : shape[0], : shape[1]].clamp(0, 1)
    return Decoded(x_hat, recovery)


def _decode_y(model: "HPCM", y: bytes, z_hat: Tensor, tables: CodingTables) -> tuple[Tensor, str]:
    symbols = model.config.M * 16 * z_hat.shape[2] * z_hat.shape[3]
    guards, coded = Guards.parse(y, symbols)
    decoder = Decoder(model.scale_table, SymbolReader(coded, tables, symbols), guards)
    try:
        return model.walk(model.h_s(z_hat), decoder), ""
    except StepMismatch as mismatch:
        step = mismatch.step
    reader = RewindingReader(coded, tables, symbols)
    recovering, exact = RecoveringDecoder(model.scale_table.cpu(), reader, guards), in_float64(model)
    y_hat = exact.walk(exact.h_s(z_hat.to("cpu", torch.float64)), recovering)
    return y_hat.to(z_hat), recovering.note(step)


@torch.no_grad()
def trace(model: "HPCM", y: bytes, z: bytes, shape: tuple[int, int]) -> Walk:
    """The scales and symbols of a coded image, in the model's own dtype. Raises StepMismatch instead of recovering.

    `trace` of `in_float64(model)` gives the reference to which other scales are compared.
    """
    tables = Tables.of(model)
    with coding_arithmetic(model.means_hyper.device):
        z_hat = _decode_z(model, z, shape, tables.z)
        symbols = model.config.M * 16 * z_hat.shape[2] * z_hat.shape[3]
        guards, coded = Guards.parse(y, symbols)
        decoder = RecordingDecoder(model.scale_table, SymbolReader(coded, tables.y, symbols), guards)
        model.walk(model.h_s(z_hat), decoder)
    return Walk(torch.cat(decoder.scales), torch.cat(decoder.symbols))


def _decode_z(model: "HPCM", z: bytes, shape: tuple[int, int], tables: CodingTables) -> Tensor:
    """ẑ (1, N, h/4, w/4), channels-last. Its tables depend on the weights alone, so it is the same on every machine."""
    z_shape = model.latent_shapes(*shape)[1]
    check, coded = split_check(z)
    reader = SymbolReader(coded, tables, math.prod(z_shape))
    z_hat = reader.take(_z_indexes(model.means_hyper.expand(1, *z_shape))) + model.means_hyper
    reader.finish(check)
    return z_hat.contiguous(memory_format=torch.channels_last)


def _z_indexes(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device).view(1, -1, 1, 1).expand_as(z)
