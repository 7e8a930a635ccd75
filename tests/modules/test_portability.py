"""Files that are decoded under another floating-point configuration, and with scales that are wrong on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from float_configurations import CONFIGURATIONS, decode_all, encode_all, results, save_inputs, start
from torch import Tensor

from modules import HPCM, preset_config
from modules.bitstream.file_format import BitstreamError
from modules.bitstream.guards import Guards
from modules.biwkv4 import op
from modules.image_codec import ImageCodec


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

    return torch.from_numpy(image("portable", 120, 100))


@contextmanager
def wrong_scales(size: float, *dtypes: torch.dtype) -> Iterator[None]:
    """Give decoders of these types scales with relative errors of up to `size`."""
    generator, index = torch.Generator().manual_seed(0), Guards.index

    def wrong(guards: Guards, step: int, scales: Tensor, table: Tensor) -> Tensor:
        if scales.dtype in dtypes:
            scales = scales * (1 + size * (2 * torch.rand(scales.shape, generator=generator) - 1).to(scales))
        return index(guards, step, scales, table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guards, "index", wrong)
        yield


def same_picture(x_hat: Tensor, expected: Tensor) -> bool:
    """Whether two pictures differ by rounding alone: by at most 1 of 255, in at most one value in a thousand."""
    difference = ((x_hat * 255).round() - (expected * 255).round()).abs()
    return bool(difference.max() <= 1) and float((difference > 0).float().mean()) < 1e-3


def test_scale_errors_within_epsilon_change_nothing(codec: ImageCodec, image: Tensor) -> None:
    coded, unguarded = codec.encode(image, epsilon=1e-4), codec.encode(image, epsilon=0)
    expected = codec.decode(coded)
    with wrong_scales(1e-4, torch.float32):
        repeated = [codec.decode(coded) for _ in range(3)]
        assert codec.decode(unguarded).recovery  # Without guards, the same errors matter.
    for decoded in repeated:
        assert decoded.recovery == expected.recovery == ""
        assert torch.equal(decoded.x_hat, expected.x_hat)


def test_larger_scale_errors_are_detected_and_float64_decodes_the_file(codec: ImageCodec, image: Tensor) -> None:
    coded = codec.encode(image)
    expected = codec.decode(coded).x_hat
    with wrong_scales(1e-2, torch.float32):
        decoded = codec.decode(coded)
    assert "decoded in float64: at coding step 1 of 11" in decoded.recovery
    assert same_picture(decoded.x_hat, expected)


def test_a_file_that_float64_cannot_decode_is_refused_with_its_step(codec: ImageCodec, image: Tensor) -> None:
    coded = codec.encode(image)
    message = r"coding step \d of 11: .*ε = 2e-05\. Decoding in float64 did not help.*larger `--epsilon`"
    with wrong_scales(2e-2, torch.float32, torch.float64), pytest.raises(BitstreamError, match=message):
        codec.decode(coded)


@pytest.mark.parametrize("name", ["no oneDNN", "1 thread", "channels first", "no kernel", "float64"])
def test_configurations_of_one_process_read_and_write_the_same_symbols(
    name: str, codec: ImageCodec, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "_kernels", op._kernels)  # so that it is restored afterwards
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    threads = torch.get_num_threads()
    other = HPCM(codec.model.config).eval()
    other.load_state_dict(codec.model.state_dict())
    coded = codec.encode(image)
    expected = codec.decode(coded).x_hat
    try:
        torch.set_num_threads(CONFIGURATIONS[name].threads)
        CONFIGURATIONS[name].prepare(other)
        decoded = other.decompress([[coded.y], [coded.z]], (120, 100))
        written = other.compress(image.to(other.means_hyper.dtype))
    finally:
        torch.set_num_threads(threads)
    for read in (decoded, codec.model.decompress(**written)):
        assert read["recovery"] == [""]
        assert same_picture(read["x_hat"], expected)


def test_other_instruction_sets_read_and_write_the_same_symbols(
    codec: ImageCodec, image: Tensor, tmp_path: Path
) -> None:
    """A part of `make portability`, and a refined file. The libraries choose their code when a process starts.

    A file that is read proves it: its checks cover every symbol and every table.
    """
    names = ["oneDNN SSE4.1", "ATen default"]
    save_inputs(tmp_path, {"tiny": codec.model}, {"image": image})
    encode_all(tmp_path, "default")
    codec.model.lmbda = 0.01
    refined = ImageCodec(codec.model, effort=1).encode(image).pack()
    assert refined != (tmp_path / "files/default/tiny@image.hpcm").read_bytes()
    (tmp_path / "files/default/tiny@refined.hpcm").write_bytes(refined)
    processes = [start(tmp_path, name, "decode", "encode") for name in names]
    assert [process.wait() for process in processes] == [0, 0]
    decode_all(tmp_path, "default")
    read = results(tmp_path, "default")
    files = ["default/tiny@image.hpcm", "default/tiny@refined.hpcm"]
    assert set(read) == {*files, *(f"{name}/tiny@image.hpcm" for name in names)}
    assert not any("refused" in one or "recovery" in one for one in read.values())
    for name in names:
        for file in files:
            assert results(tmp_path, name)[file]["symbols"] == read[file]["symbols"]
