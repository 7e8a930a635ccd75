"""Files of one arithmetic decoded under another: real ones, ones that are wrong on purpose, and version 1."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import arithmetics
import pytest
import torch
from torch import Tensor

from modules import HPCM, coding, preset_config, version1
from modules.bitstream.coders import Decoder
from modules.bitstream.guards import nearest_boundary, step_sizes, table_index
from modules.bitstream.image_codec import CodedImage, ImageCodec
from modules.bitstream.rans import BitstreamError, SymbolWriter
from modules.bitstream.recovery import RecoveringDecoder, in_float64
from modules.context.coding_order import to_rows


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    """The tiny preset, with scales of all sizes and residuals that need some bits."""
    torch.manual_seed(2)
    model = HPCM(preset_config("tiny", 4)).eval()
    with torch.no_grad():
        model.g_a.branch[-1].weight *= 8
    return ImageCodec(model)


@pytest.fixture(scope="module")
def image() -> Tensor:
    from formula import image

    return torch.from_numpy(image("portable", 120, 200))


@contextmanager
def other_scales(change: Callable[[Tensor], Tensor], *decoders: type[Decoder]) -> Iterator[None]:
    """Change the scales that decoders of these classes see."""
    originals = [decoder._symbols for decoder in decoders]
    for decoder, original in zip(decoders, originals, strict=True):
        decoder._symbols = lambda self, scales, original=original: original(self, change(scales))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for decoder, original in zip(decoders, originals, strict=True):
            decoder._symbols = original  # type: ignore[method-assign]


def noise(size: float) -> Callable[[Tensor], Tensor]:
    """Relative errors of up to `size`, either way."""
    generator = torch.Generator().manual_seed(0)
    return lambda scales: scales * (1 + size * (2 * torch.rand(scales.shape, generator=generator) - 1).to(scales))


def same_picture(x_hat: Tensor, expected: Tensor) -> bool:
    """Whether two pictures differ by rounding alone: by at most 1 of 255, in at most one value in a thousand."""
    difference = ((x_hat * 255).round() - (expected * 255).round()).abs()
    return bool(difference.max() <= 1) and float((difference > 0).float().mean()) < 1e-3


def test_errors_within_epsilon_change_nothing(codec: ImageCodec, image: Tensor) -> None:
    coded, plain = codec.encode(image, epsilon=1e-4), codec.encode(image, epsilon=0)
    expected = codec.decode(coded)
    with other_scales(noise(1e-4), Decoder):
        every = [codec.decode(coded) for _ in range(3)]
        assert codec.decode(plain).recovery  # The test could fail: without guards, the walk parts.
    for decoded in every:
        assert decoded.recovery == expected.recovery == ""
        assert torch.equal(decoded.x_hat, expected.x_hat)


def test_errors_beyond_it_are_recovered_in_float64(codec: ImageCodec, image: Tensor) -> None:
    coded = codec.encode(image)
    expected = codec.decode(coded).x_hat
    with other_scales(noise(1e-2), Decoder):  # The decoder that recovers overrides it, and is spared.
        decoded = codec.decode(coded)
    assert "decoded in float64: at coding step 1 of 11" in decoded.recovery
    assert same_picture(decoded.x_hat, expected)


def test_one_table_chosen_otherwise_is_found(codec: ImageCodec, image: Tensor) -> None:
    """An encoder whose error exceeded ε: one of its scales was on the other side of a boundary."""
    coded = codec.encode(image, epsilon=0)
    shape, expected = (coded.height, coded.width), codec.decode(coded).x_hat
    walk = coding.trace(in_float64(codec.model), coded.y, coded.z, shape)
    sizes, step = step_sizes(len(walk.scales)), 7
    begin = sum(sizes[:step])
    above, _ = nearest_boundary(walk.scales[begin : begin + sizes[step]], codec.model.scale_table.double())
    first, second = above[above < 0].topk(2).values.tolist()
    factor = math.exp(-(first + second) / 2)  # takes the nearest one across, and no other
    original = RecoveringDecoder._symbols

    def crossed(decoder: RecoveringDecoder, scales: Tensor) -> Tensor | None:
        return original(decoder, scales * factor if decoder.step == step else scales)

    with pytest.MonkeyPatch.context() as patch, other_scales(noise(1e-2), Decoder):
        patch.setattr(RecoveringDecoder, "_symbols", crossed)
        decoded = codec.decode(coded)
    assert "with 1 tables found in" in decoded.recovery
    assert same_picture(decoded.x_hat, expected)


def test_what_cannot_be_recovered_is_refused_with_its_step(codec: ImageCodec, image: Tensor) -> None:
    coded = codec.encode(image)
    with (
        other_scales(noise(2e-2), Decoder, RecoveringDecoder),
        pytest.raises(BitstreamError, match=r"coding step \d of 11: .*ε = 2e-05\. .*needs an ε above \d"),
    ):
        codec.decode(coded)


@pytest.mark.parametrize("name", ["no oneDNN", "1 thread", "channels first", "no kernel", "float64"])
def test_other_arithmetics_of_this_process(
    name: str, codec: ImageCodec, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.biwkv4.op._kernels", sys.modules["modules.biwkv4.op"]._kernels)  # put back
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    threads = torch.get_num_threads()
    other = HPCM(codec.model.config).eval()
    other.load_state_dict(codec.model.state_dict())
    coded, shape = codec.encode(image), (120, 200)
    strings, expected = [[coded.y], [coded.z]], codec.decode(coded).x_hat
    try:
        torch.set_num_threads(arithmetics.ARITHMETICS[name].threads)
        arithmetics.ARITHMETICS[name].prepare(other)
        decoded = other.decompress(strings, shape)
        written = other.compress(image.to(other.means_hyper.dtype))
    finally:
        torch.set_num_threads(threads)
    assert decoded["recovery"] == [""]
    assert same_picture(decoded["x_hat"], expected)
    back = codec.model.decompress(**written)
    assert back["recovery"] == [""]
    assert same_picture(back["x_hat"], expected)


def test_other_instruction_sets_read_and_write_the_same(codec: ImageCodec, image: Tensor, tmp_path: Path) -> None:
    """The short form of the matrix in `arithmetics.py`: processes of their own, where libraries choose their code anew.

    That a file was read is the proof: its checks hold every symbol and every table.
    """
    names = ["oneDNN SSE4.1", "ATen default"]
    arithmetics.save_codec(codec.model, tmp_path / "codecs" / "tiny.pt")
    (tmp_path / "images").mkdir()
    torch.save(image, tmp_path / "images" / "image.pt")
    arithmetics.encode_all(tmp_path, "default")
    processes = [arithmetics.start(tmp_path, name, "decode", "encode") for name in names]
    assert [process.wait() for process in processes] == [0, 0]
    arithmetics.decode_all(tmp_path, "default")
    read = arithmetics.results(tmp_path, "default")
    assert set(read) == {f"{name}/tiny@image.hpcm" for name in ("default", *names)}
    assert not any("refused" in one or "recovery" in one for one in read.values())
    for name in names:
        assert arithmetics.results(tmp_path, name)["default/tiny@image.hpcm"] == read["default/tiny@image.hpcm"]


def test_version_1_is_read_where_it_was_written(codec: ImageCodec, image: Tensor) -> None:
    model = codec.model
    scale_table, tables = version1._tables()
    writer = SymbolWriter(tables)
    newest = codec.encode(image, epsilon=0)
    with torch.no_grad():
        z_hat = coding._decode_z(model, newest.z, (120, 200), coding.Tables.of(model).z)
        y = to_rows(model.g_a(model._pad(image)), model.config.M // 8)

        def code(step, scales: Tensor, means: Tensor) -> Tensor:
            symbols = (y.index_select(1, step.rows) - means).round()
            return writer.put(symbols, table_index(scales, scale_table)) + means

        model.walk(model.h_s(z_hat), code)
    oldest = bytes([torch.get_num_threads()]) + writer.string()
    coded = CodedImage(codec.identity, 120, 200, newest.z, oldest, version=1)
    assert CodedImage.parse(coded.pack()) == coded
    assert coded.guards is None
    assert torch.equal(codec.decode(coded).x_hat, codec.decode(newest).x_hat)
    with pytest.raises(BitstreamError, match="the header names version 2, but the latent has another one"):
        codec.decode(CodedImage(codec.identity, 120, 200, newest.z, oldest))
