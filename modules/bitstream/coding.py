"""Codes one image to the strings of y and z, and back. Decoding finds differences between machines and recovers."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from modules.bitstream.coders import Decoder, Encoder, StepMismatch
from modules.bitstream.determinism import deterministic_float32
from modules.bitstream.graphs import walk
from modules.bitstream.guards import STEPS, Guards
from modules.bitstream.rans import SymbolReader, SymbolWriter, split_check
from modules.bitstream.tables import CodingTables, Tables
from modules.network import HPCMNetwork
from modules.refinement import Latent

Network = TypeVar("Network", bound=nn.Module)


class Decoded(NamedTuple):
    """An image (1, 3, H, W) in [0, 1], and how it was recovered; "" if no recovery was needed."""

    x_hat: Tensor
    recovery: str


class Trace(NamedTuple):
    """What a decoder computes and reads: the scales and symbols of y in coding order, and the image.

    Scales and symbols are (symbols,). The image is (1, 3, H, W) in [0, 1].
    """

    scales: Tensor
    symbols: Tensor
    x_hat: Tensor


def encode(
    network: HPCMNetwork,
    image: Tensor,
    tables: Tables,
    epsilon: float,
    refined: Callable[[Latent], Latent] = lambda latent: latent,
) -> tuple[bytes, bytes]:
    """The strings of y and z of an image (1, 3, H, W) in [0, 1]. `modules.bitstream.guards` explains ε.

    `refined` may replace the latent before it is coded.
    """
    with deterministic_float32(image.device):
        y = network.analyzed(image)
        y, z = refined(Latent(y, network.h_a(y)))
        z_symbols = (z - network.means_hyper).round()
        encoder = Encoder(network.symbol_rows(y))
        walk(network, z_symbols.int() + network.means_hyper, encoder)
        z_writer, y_writer = SymbolWriter(tables.z), SymbolWriter(tables.y)
        z_writer.put(z_symbols, _z_indexes(z))
        guards = encoder.write(tables.scales, y_writer, epsilon)
    return guards.pack() + y_writer.coded(), z_writer.string()


def decode(network: HPCMNetwork, y: bytes, z: bytes, shape: tuple[int, int], tables: Tables) -> Decoded:
    """The image of this shape. If this machine reads other symbols than the encoder wrote, it decodes in float64.

    Raises BitstreamError for damaged strings, for strings of another model, and if float64 does not help.
    """
    with deterministic_float32(network.means_hyper.device):
        z_hat = _decode_z(network, z, shape, tables.z)
        guards, reader = _start(network, y, z_hat, tables.y)
        try:
            y_hat, recovery = walk(network, z_hat, Decoder(tables.scales, reader, guards)), ""
        except StepMismatch as mismatch:
            y_hat = _decode_in_float64(network, y, z_hat, tables)
            recovery = (
                f"decoded in float64: at coding step {mismatch.step + 1} of {STEPS}, float32 on this machine was off "
                f"by more than the file's ε = {guards.epsilon:.1g}"
            )
        return Decoded(network.synthesized(y_hat, shape).clamp(0, 1), recovery)


def _decode_in_float64(network: HPCMNetwork, y: bytes, z_hat: Tensor, tables: Tables) -> Tensor:
    exact = in_float64(network)
    guards, reader = _start(network, y, z_hat, tables.y)
    try:
        decoder = Decoder(tables.scales.cpu(), reader, guards)
        return walk(exact, z_hat.to("cpu", torch.float64), decoder).to(z_hat)
    except StepMismatch as mismatch:
        raise StepMismatch(
            mismatch.step,
            f" by more than the file's ε = {guards.epsilon:.1g}. Decoding in float64 did not help. If the cause is "
            "rounding, encode the image again with a larger `--epsilon`",
        ) from mismatch


def trace(network: HPCMNetwork, y: bytes, z: bytes, shape: tuple[int, int], tables: Tables) -> Trace:
    """Decode an image in the network's own dtype. Raises StepMismatch instead of recovering."""
    with deterministic_float32(network.means_hyper.device):
        z_hat = _decode_z(network, z, shape, tables.z)
        guards, reader = _start(network, y, z_hat, tables.y)
        decoder = Decoder(tables.scales, reader, guards)
        y_hat = walk(network, z_hat, decoder)
        return Trace(*decoder.recorded, network.synthesized(y_hat, shape).clamp(0, 1))


def in_float64(network: Network) -> Network:
    """A copy of the network in float64 on the CPU. There every layer has a float64 kernel."""
    return copy.deepcopy(network).to("cpu", torch.float64)


def _start(network: HPCMNetwork, y: bytes, z_hat: Tensor, tables: CodingTables) -> tuple[Guards, SymbolReader]:
    """The guards of y, and a reader at its first symbol."""
    symbols = network.config.M * 16 * z_hat.shape[2] * z_hat.shape[3]
    guards, coded = Guards.parse(y, symbols)
    return guards, SymbolReader(coded, tables, symbols)


def _decode_z(network: HPCMNetwork, z: bytes, shape: tuple[int, int], tables: CodingTables) -> Tensor:
    """ẑ (1, N, h/4, w/4), channels-last. Its tables depend on the weights alone, so it is the same on every machine."""
    z_shape = network.latent_shapes(*shape)[1]
    check, coded = split_check(z)
    reader = SymbolReader(coded, tables, math.prod(z_shape))
    z_hat = reader.take(_z_indexes(network.means_hyper.expand(1, *z_shape))) + network.means_hyper
    reader.finish(check)
    return z_hat.contiguous(memory_format=torch.channels_last)


def _z_indexes(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1], device=z.device).view(1, -1, 1, 1).expand_as(z)
