"""Symbols and escapes: every value comes back, and no input makes CompressAI's decoder read beyond appended zeros."""

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.bitstream.file_format import BitstreamError
from modules.bitstream.guards import table_index
from modules.bitstream.rans import LIMIT, SymbolReader, SymbolWriter, longest, split_check
from modules.bitstream.tables import CodingTables
from modules.layers.entropy import GeneralizedGaussian, scale_table


@pytest.fixture(scope="module")
def tables() -> CodingTables:
    return CodingTables.from_buffers(*GeneralizedGaussian().tables(scale_table()))


def written(symbols: Tensor, indexes: Tensor, tables: CodingTables) -> bytes:
    writer = SymbolWriter(tables)
    writer.put(symbols.float(), indexes)
    return writer.string()


def test_every_magnitude_is_decoded_with_every_table(tables: CodingTables) -> None:
    reach = tables.reach.long()[:, None]
    steps = torch.tensor([0, 1, 2, 63, 64, 65, 8191, 8192, 2**20])
    magnitudes = torch.cat((torch.zeros_like(reach), reach // 2, reach + steps, torch.full_like(reach, LIMIT - 1)), 1)
    symbols = torch.stack((magnitudes, -magnitudes))
    indexes = torch.arange(len(reach))[:, None].expand_as(symbols)
    check, coded = split_check(written(symbols, indexes, tables))
    reader = SymbolReader(coded, tables, symbols.numel())
    assert torch.equal(reader.take(indexes), symbols.int())
    reader.finish(check)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LIMIT])
def test_values_that_cannot_be_coded_are_refused(value: float, tables: CodingTables) -> None:
    with pytest.raises(BitstreamError, match="not finite or too large"):
        SymbolWriter(tables).put(torch.tensor([0.0, value]), torch.tensor([0, 0]))


def test_another_table_is_detected_even_if_it_gives_the_same_symbols() -> None:
    twins = CodingTables.from_buffers(*GeneralizedGaussian().tables(torch.ones(2)))
    first, second = torch.zeros(64, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    check, coded = split_check(written(torch.arange(64), first, twins))
    reader = SymbolReader(coded, twins, 64)
    assert torch.equal(reader.take(second), torch.arange(64, dtype=torch.int32))
    with pytest.raises(BitstreamError, match="do not match their check value"):
        reader.finish(check)


@pytest.mark.parametrize("length", [0, 3, 7, 9])
def test_strings_that_no_coder_writes_are_refused(length: int, tables: CodingTables) -> None:
    with pytest.raises(BitstreamError, match="not a range coder's stream"):
        SymbolReader(b"\xff" * length, tables, 10)
    with pytest.raises(BitstreamError, match="not a range coder's stream"):
        SymbolReader(bytes(100), tables, 10)  # a state too small: the coder would read a word for every symbol


def test_stream_length_matches_the_likelihoods(tables: CodingTables) -> None:
    """Within 0.5 % + 64 bytes of the likelihoods' estimate, where symbols follow the distribution."""
    model, random = GeneralizedGaussian(), np.random.default_rng(0)
    scales = torch.from_numpy(np.exp(random.uniform(np.log(0.12), np.log(64), 200_000)).astype(np.float32))
    magnitude = random.gamma(1 / 1.5, size=len(scales)) ** (1 / 1.5)
    symbols = (scales * torch.from_numpy(magnitude * random.choice([-1, 1], len(scales))).float()).round()
    estimate = float(-model(symbols, scales).log2().sum()) / 8
    coded = len(written(symbols, table_index(scales, scale_table()), tables))
    assert abs(coded - estimate) < 0.005 * estimate + 64


def test_a_scale_selects_the_nearest_table_by_ratio() -> None:
    table = scale_table()
    scales = torch.logspace(-3, 3, 5000)
    distance = (scales[:, None].log() - table.log()).abs()
    chosen = distance.gather(1, table_index(scales, table).long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), rtol=0, atol=1e-5)


def words_read(stream: bytes, indexes: list[int], tables: CodingTables) -> int:
    """32-bit words that the coder takes for these symbols and their excesses, the stream followed by zeros."""
    words = np.frombuffer(stream, dtype="<u4").tolist()
    state, at = words[0] | words[1] << 32, 2
    cdfs, lengths, _ = tables.lists

    def next_symbol(index: int) -> int:
        nonlocal state, at
        cdf, low = cdfs[index], state & 0xFFFF
        symbol = next(i for i, bound in enumerate(cdf) if bound > low) - 1
        state = (cdf[symbol + 1] - cdf[symbol]) * (state >> 16) + low - cdf[symbol]
        if state < 2**31:
            state = state << 32 | (words[at] if at < len(words) else 0)
            at += 1
        return symbol

    escapes = sum(next_symbol(index) == lengths[index] - 3 for index in indexes)
    for _ in range(4):
        escapes = sum(next_symbol(tables.byte) > 127 for _ in range(escapes))
    return at


@pytest.mark.parametrize("kind", ["random", "ones", "escapes"])
def test_the_coder_reads_no_further_than_the_appended_zeros(kind: str, tables: CodingTables) -> None:
    count = 300
    indexes = torch.arange(count) % tables.byte
    streams = {
        "random": np.random.default_rng(0).bytes(40),
        "ones": b"\xff" * 40,
        "escapes": written(torch.full((count,), LIMIT - 1), indexes, tables)[4:],
    }
    stream = streams[kind]
    read = words_read(stream, indexes.tolist(), tables)
    assert 4 * read > len(stream) or kind == "escapes"
    assert 4 * read <= len(stream) + longest(count)
    assert len(streams["escapes"]) <= longest(count)
