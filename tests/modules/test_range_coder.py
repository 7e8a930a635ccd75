"""The compiled range coder has CompressAI's bytes, and no stream, table or symbol takes it outside of its memory."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.bitstream import range_coder
from modules.bitstream.file_format import BitstreamError
from modules.bitstream.range_coder import RangeDecoder, compiled, encode
from modules.bitstream.rans import SymbolReader, SymbolWriter, longest
from modules.bitstream.tables import TOTAL, CodingTables, Tables, built_tables
from modules.compressai_parts import RansDecoder, RansEncoder
from modules.layers.entropy import GeneralizedGaussian, scale_table

Buffers = tuple[Tensor, Tensor, Tensor]


def drawn_buffers(random: np.random.Generator) -> Buffers:
    """Tables of 3 to 2001 symbols with random frequencies, and two with the most extreme ones."""
    reaches = [0, 1, *random.integers(0, 30, 5).tolist(), 999]
    cdfs = torch.zeros(len(reaches), 2 * max(reaches) + 3, dtype=torch.int32)
    for row, reach in zip(cdfs, reaches, strict=True):
        inner = np.sort(random.choice(TOTAL - 1, 2 * reach + 1, replace=False) + 1)
        row[: 2 * reach + 3] = torch.tensor([0, *inner, TOTAL])
    cdfs[0, 1] = TOTAL - 1
    cdfs[1, 1:4] = torch.tensor([1, 2, 3])
    return cdfs, torch.tensor([2 * reach + 3 for reach in reaches]), -torch.tensor(reaches)


def drawn_symbols(tables: CodingTables, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Symbols and table indexes, both (count,) int32: any symbol that a table has, the escape too."""
    indexes = random.integers(0, tables.byte + 1, count)
    sizes = np.diff(tables.starts)[indexes] - 1
    symbols = tables.lowest[indexes] + random.integers(0, 2**31, count) % sizes
    return torch.from_numpy(symbols).int(), torch.from_numpy(indexes).int()


@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_are_those_of_compressais_coder(seed: int) -> None:
    random = np.random.default_rng(seed)
    tables = CodingTables.from_buffers(*drawn_buffers(random))
    for count in (*range(40), 5000):
        symbols, indexes = drawn_symbols(tables, count, random)
        coded = encode(symbols, indexes, tables)
        if count > 1:  # With fewer, CompressAI's coder writes outside of its memory.
            assert coded == RansEncoder().encode_with_indexes(symbols.tolist(), indexes.tolist(), *tables.lists)
        decoder = RangeDecoder(coded, tables, longest(count))
        parts = indexes.split(max(1, count // 3))  # A decoder continues where its last call ended.
        assert torch.equal(torch.cat([decoder.decode(part) for part in parts]), symbols)


def test_a_stream_that_ends_too_early_is_refused_at_every_length() -> None:
    random = np.random.default_rng(0)
    tables = CodingTables.from_buffers(*drawn_buffers(random))
    symbols, indexes = drawn_symbols(tables, 200, random)
    coded = encode(symbols, indexes, tables)
    for length in range(8, len(coded), 4):
        with pytest.raises(BitstreamError, match="the stream ends before its last symbol"):
            RangeDecoder(coded[:length], tables, longest(200)).decode(indexes)


def test_any_bytes_give_the_symbols_of_compressais_coder_or_an_error() -> None:
    random = np.random.default_rng(0)
    tables, ended = CodingTables.from_buffers(*drawn_buffers(random)), 0
    for _ in range(300):
        indexes = torch.from_numpy(random.integers(0, tables.byte + 1, 60)).int()
        coded = random.integers(1, 256, 8 + 4 * random.integers(16), dtype=np.uint8).tobytes()
        plain = RansDecoder()
        plain.set_stream(coded + bytes(longest(60)))
        try:
            found = RangeDecoder(coded, tables, longest(60)).decode(indexes)
        except BitstreamError:
            ended += 1
        else:
            assert found.tolist() == plain.decode_stream(indexes.tolist(), *tables.lists)
    assert 0 < ended < 300


def test_tables_and_symbols_that_do_not_exist_are_refused() -> None:
    tables = CodingTables.from_buffers(*drawn_buffers(np.random.default_rng(0)))
    none = torch.zeros(1, dtype=torch.int32)
    for index in (-1, tables.byte + 1, 2**31 - 1, -(2**31)):
        indexes = none + index
        with pytest.raises(ValueError, match="does not exist"):
            encode(none, indexes, tables)
        with pytest.raises(ValueError, match="does not exist"):
            RangeDecoder(encode(none, none, tables), tables, longest(1)).decode(indexes)
    for symbol in (-1, 2, 2**31 - 1, -(2**31)):  # The first table has 0 and its escape symbol, 1.
        with pytest.raises(ValueError, match="lacks the symbol"):
            encode(none + symbol, none, tables)


@pytest.fixture(scope="module")
def buffers() -> dict[str, Tensor]:
    return built_tables(GeneralizedGaussian(), torch.ones(8), scale_table())


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("quantized_cdf_y", (3, 0), 1),
        ("quantized_cdf_y", (3, 2), 0),
        ("quantized_cdf_y", (3, 2), -(2**31)),
        ("quantized_cdf_y", (3, 2), 2**31 - 1),
        ("quantized_cdf_y", (59, -1), TOTAL - 1),
        ("quantized_cdf_y", (59, -1), TOTAL + 1),
        ("cdf_length_y", 3, 0),
        ("cdf_length_y", 3, -1),
        ("cdf_length_y", 59, 2**31 - 1),
        ("cdf_length_z", 0, 2),
        ("offset_y", 3, 1),
        ("offset_y", 3, -(2**31)),
    ],
)
def test_an_invalid_entry_of_the_tables_is_refused(
    name: str, at: int | tuple[int, int], value: int, buffers: dict[str, Tensor]
) -> None:
    forged = buffers[name].clone()
    forged[at] = value
    with pytest.raises(ValueError, match=r"call update\(\)"):
        Tables.from_buffers({**buffers, name: forged})


@pytest.mark.parametrize("name", ["scale_table", "quantized_cdf_y", "cdf_length_z", "offset_y"])
def test_tables_of_another_number_are_refused(name: str, buffers: dict[str, Tensor]) -> None:
    for forged in (buffers[name][1:], buffers[name][:, None]):
        with pytest.raises(ValueError, match=r"call update\(\)"):
            Tables.from_buffers({**buffers, name: forged})


def test_without_a_compiler_compressais_coder_codes_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables = CodingTables.from_buffers(*GeneralizedGaussian().tables(scale_table()))
    values = torch.arange(-300.0, 300.0)
    indexes = torch.arange(600, dtype=torch.int32) % tables.byte

    def coded() -> bytes:
        writer = SymbolWriter(tables)
        writer.put(values, indexes)
        return writer.coded()

    with_compiler = coded()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(range_coder, "compiled", compiled.__wrapped__)
    with caplog.at_level(logging.INFO):
        assert coded() == with_compiler
    assert "CompressAI's coder: cannot run /nowhere/c++" in caplog.text
    assert caplog.records[0].levelno == logging.INFO
    assert torch.equal(SymbolReader(with_compiler, tables, 600).take(indexes), values.int())


def test_threads_decode_at_once() -> None:
    random = np.random.default_rng(0)
    tables = CodingTables.from_buffers(*drawn_buffers(random))
    drawn = [drawn_symbols(tables, 20_000, random) for _ in range(4)]

    def decoded(symbols: Tensor, indexes: Tensor) -> Tensor:
        decoder = RangeDecoder(encode(symbols, indexes, tables), tables, longest(len(symbols)))
        return torch.cat([decoder.decode(part) for part in indexes.split(1000)])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: decoded(*pair), drawn * 3))
    assert all(torch.equal(one, symbols) for one, (symbols, _) in zip(found, drawn * 3, strict=True))
