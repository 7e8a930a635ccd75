"""The file format: what is written, which files are refused and why, the model of a file, and fuzzing."""

import dataclasses
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import fuzz_bitstream
import pytest
import torch

from modules import HPCM, HPCMConfig
from modules.bitstream.file_format import MAX_PROFILE, BitstreamError, CodedImage
from modules.bitstream.identity import model_identity
from modules.image_codec import ImageCodec

CODED = CodedImage(b"identity", 3, 5, z=b"the z", y=b"the y string", icc_profile=b"profile")


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    torch.manual_seed(0)
    return fuzz_bitstream.mini_codec()


def test_the_bytes_are_the_documented_ones() -> None:
    header = b"HPCM" + bytes([2, 0]) + b"identity" + struct.pack("<5I", 3, 5, 7, 5, 12)
    body = b"profile" + b"the z" + b"the y string"
    expected = header + struct.pack("<I", zlib.crc32(header)) + body + struct.pack("<I", zlib.crc32(body))
    assert CODED.pack() == expected
    assert CodedImage.parse(expected) == CODED


def with_header(change: Callable[[bytearray], None]) -> bytes:
    """A file whose header was changed and given its right checksum."""
    data = bytearray(CODED.pack())
    change(data)
    data[34:38] = struct.pack("<I", zlib.crc32(data[:34]))
    return bytes(data)


def put(at: int, values: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(values)] = values

    return change


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"HPCM", "truncated: 4 bytes; the header alone has 38"),
        (b"\x89PNG" + bytes(100), "not an HPCM file"),
        (CODED.pack()[:-1], "truncated: 65 of 66 bytes"),
        (CODED.pack()[:40], "truncated: 40 of 66 bytes"),
        (CODED.pack() + b"xy", "extended: 2 bytes follow the image"),
        (CODED.pack()[:-9] + b"?" + CODED.pack()[-8:], "damaged: the coded image"),
        (CODED.pack()[:14] + b"?" + CODED.pack()[15:], "damaged: the header"),
        (with_header(put(4, bytes([3]))), "format version 3; this program reads version 2"),
        (with_header(put(5, bytes([1]))), "color format 1"),
        (with_header(put(14, struct.pack("<I", 0))), "5×0 pixels"),
        (with_header(put(14, struct.pack("<2I", 2**31, 2**31))), "images have 1 to"),
        (with_header(put(30, struct.pack("<I", 2**32 - 1))), "4294967349 bytes: far more than 5×3 pixels can have"),
    ],
)
def test_errors_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        CodedImage.parse(data)


def test_a_profile_that_no_reader_takes_is_not_written() -> None:
    CodedImage.parse(dataclasses.replace(CODED, icc_profile=bytes(MAX_PROFILE)).pack())
    with pytest.raises(BitstreamError, match="an ICC profile of 16,777,217 bytes"):
        dataclasses.replace(CODED, icc_profile=bytes(MAX_PROFILE + 1)).pack()


def test_every_flipped_bit_and_truncation_is_detected() -> None:
    data = CODED.pack()
    broken = [data[:at] for at in range(len(data))]
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for one in broken:
        with pytest.raises(BitstreamError):
            CodedImage.parse(one)


def test_of_a_file_with_the_wrong_length_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.hpcm"
    path.write_bytes(CODED.pack())
    with path.open("r+b") as file:
        file.truncate(2**42)
    with pytest.raises(BitstreamError, match="extended"):
        CodedImage.read(path)


def test_a_file_of_another_model_is_not_decoded(codec: ImageCodec) -> None:
    coded = codec.encode(torch.rand(1, 3, 8, 8))
    assert codec.decode(coded).x_hat.shape == (1, 3, 8, 8)
    other = dataclasses.replace(coded, identity=b"somebody")
    with pytest.raises(BitstreamError, match=f"made by another model: {b'somebody'.hex()}"):
        codec.decode(other)


def test_an_image_too_large_for_the_format_is_refused_before_coding(codec: ImageCodec) -> None:
    with pytest.raises(BitstreamError, match="images have 1 to"):
        codec.encode(torch.zeros(1).expand(1, 3, 1, 2**26))


def test_the_identity_covers_all_that_a_decoder_computes_with(codec: ImageCodec) -> None:
    model = HPCM(codec.model.config)
    model.load_state_dict(codec.model.state_dict())
    assert model_identity(model) == codec.identity
    empty = {name: torch.empty(0, dtype=t.dtype) for name, t in model.state_dict().items() if "table" in name}
    model.load_state_dict({**model.state_dict(), **empty})
    with torch.no_grad():
        model.g_a.branch[0].weight += 1
        model.h_a.branch[1].bias += 1
    model.to(memory_format=torch.contiguous_format)
    assert model_identity(model) == codec.identity
    for parameter in (model.g_s.branch[0].weight, model.scales_hyper, model.y_spatial_prior_s3.branch_2[-1].bias):
        before = model_identity(model)
        with torch.no_grad():
            parameter += 1e-6
        assert model_identity(model) != before
    baseline = fuzz_bitstream.mini_codec(0).model
    wider = HPCM(baseline.config.changed(attn_s3={"window": 8}))
    wider.load_state_dict(baseline.state_dict())
    assert model_identity(wider) != model_identity(baseline)


def test_settings_at_their_defaults_are_not_part_of_the_identity(
    codec: ImageCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of today stay decodable after a later version adds a setting."""
    added = HPCMConfig.to_dict
    monkeypatch.setattr(HPCMConfig, "to_dict", lambda config: {**added(config), "later": 1})
    assert model_identity(codec.model) == codec.identity


def test_fuzzing() -> None:
    tally = fuzz_bitstream.fuzz(600)
    assert tally.total() == 600
    for answer in ("truncated", "extended", "damaged", "not an HPCM file"):
        assert tally[f"file: {answer}"] > 0
    assert tally["strings: any image, comparison off"] > 0
    assert tally["strings: coding step"] > 0
    assert tally["guards: damaged"] > 0
    assert tally["guards: accepted"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fuzzing_at_length_under_a_memory_limit() -> None:
    command = [sys.executable, fuzz_bitstream.__file__, "100000"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "100000 in all" in run.stdout
