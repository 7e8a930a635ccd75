"""`hpcm compress` and `decompress` on the command line."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mini import Hpcm
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from skimage.data import coffee

from modules.bitstream.file_format import CodedImage
from modules.image_codec import ImageCodec
from pipeline.common import memory
from pipeline.data.pictures import SUFFIXES
from pipeline.evaluation import conversions
from pipeline.evaluation.limits import coding_bytes, padded_pixels
from pipeline.weights.checkpoints import load_codec


def test_a_folder_is_compressed_and_decompressed(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    coded, decoded = photos.parent / "coded", photos.parent / "decoded"
    with Image.open(photos / "more" / "turned.jpg") as source:
        profile = source.info["icc_profile"]
    printed = hpcm("compress", photos, "-o", coded, "-c", checkpoint).out
    size = (coded / "one.hpcm").stat().st_size
    for text in (f"{8 * size / 2400:.4f}", "60×40", "40×60"):
        assert text in printed
    printed = hpcm("info", coded).out
    for text in (str(len(profile)), "2e-05", CodedImage.read(coded / "one.hpcm").identity.hex()):
        assert text in printed
    hpcm("decompress", coded, "-o", decoded, "-c", checkpoint)
    with Image.open(decoded / "one.png") as one, Image.open(decoded / "more" / "turned.png") as turned:
        assert (one.size, turned.size) == ((60, 40), (40, 60))
        assert "icc_profile" not in one.info
        assert turned.info["icc_profile"] == profile
        expected = ImageCodec(load_codec(checkpoint)).decode(CodedImage.read(coded / "one.hpcm")).x_hat
        assert np.array_equal(np.asarray(one), (expected[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_without_a_checkpoint_the_bundled_codec_of_every_rate_is_used(tmp_path: Path, hpcm: Hpcm) -> None:
    photo, coded, back = (tmp_path / name for name in ("coffee.png", "coffee.hpcm", "back.png"))
    Image.fromarray(coffee()[100:228, 100:292]).save(photo)
    hpcm("compress", photo)
    hpcm("decompress", coded, "-o", back)
    assert "coffee.png" in hpcm("evaluate", photo, "--quality", 2.5).out
    assert "bundled variable.safetensors" in hpcm("info", coded).out
    error = np.asarray(Image.open(photo), dtype=float) - np.asarray(Image.open(back), dtype=float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 28
    assert coded.stat().st_size < 128 * 192 / 8  # 1 bit per pixel


def test_epsilon_sets_the_guards(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    source, sizes = photos / "one.png", []
    for epsilon in ("0", "0.001"):
        target = photos / f"{epsilon}.hpcm"
        printed = hpcm("compress", source, "-o", target, "-c", checkpoint, "--epsilon", epsilon, "--no-verify")
        assert "–" in printed.out  # no PSNR: it was not decoded
        sizes.append(target.stat().st_size)
        guards = CodedImage.read(target).guards
        assert guards is not None
        assert (guards.epsilon, guards.guard_bytes > 0) == (pytest.approx(float(epsilon)), epsilon != "0")
    assert sizes[0] < sizes[1]
    hpcm("compress", source, "--epsilon", "0.1", code=2)
    hpcm("compress", source, "-c", checkpoint, "--quality", "2", code=2)


def test_the_format_follows_the_suffix_of_the_output(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    target = photos / "renamed.hpcm"
    hpcm("compress", photos / "one.png", "-o", target, "-c", checkpoint)
    decoded = {}
    for suffix in ("png", "webp", "jpg", "avif"):
        back = photos / f"back.{suffix}"
        hpcm("decompress", target, "-o", back, "-c", checkpoint)
        with Image.open(back) as image:
            decoded[image.format] = np.asarray(image)
            if suffix == "jpg":
                assert get_sampling(image) == 0  # color in full resolution
                assert max(image.quantization[0]) < 13  # quality 95
    assert decoded["PNG"].shape == decoded["JPEG"].shape == decoded["AVIF"].shape == (40, 60, 3)
    assert np.abs(decoded["PNG"].astype(int) - decoded["AVIF"]).mean() < 5
    assert np.array_equal(decoded["PNG"], decoded["WEBP"])
    printed = hpcm("decompress", target, "-o", photos / "one.pdf", "-c", checkpoint, code=1)
    assert "unknown format; give a name that ends in one of .png" in printed.err


def test_files_of_other_kinds_in_a_folder_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.heic", "coded.hpcm"):
        (tmp_path / name).touch()
    assert conversions.find([tmp_path], SUFFIXES) == [("a.png", tmp_path / "a.png")]
    assert caplog.messages == [f"{tmp_path}: skipped 1 of kinds that are not read (.heic: 1)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nothing.png", "-c", "lean"), "nothing.png: no such file or folder"),
        (("decompress", ".", "-c", "lean"), "no files with the suffix .hpcm in or below this folder"),
        (("compress", "one.png", "-c", "nowhere"), "nowhere: no such file"),
        (("compress", "one.png", "-o", "one.jpg"), "one.jpg: "),
        (("compress", ".", "-o", "all.hpcm"), "all.hpcm: "),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, photos: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.chdir(photos)
    printed = hpcm(*arguments, code=1).err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not list(photos.glob("*.jpg")) + list(photos.glob("*.hpcm"))


def test_files_are_replaced_only_on_request(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    source, target = photos / "one.png", photos / "one.hpcm"
    target.write_bytes(b"mine")
    assert "one.hpcm: exists; --overwrite replaces it" in hpcm("compress", source, "-c", checkpoint, code=1).err
    printed = hpcm("compress", photos, "-c", checkpoint, "--skip-existing", "--json")
    assert "skipped: 1 of " in printed.err
    (coded,) = json.loads(printed.out)
    assert (coded["target"], coded["width"]) == (str(photos / "more" / "turned.hpcm"), 40)
    assert target.read_bytes() == b"mine"
    assert (photos / "more" / "turned.hpcm").is_file()
    hpcm("compress", source, "-c", checkpoint, "--overwrite")
    assert CodedImage.read(target).width == 60
    assert "skipped: 1 of 1" in hpcm("decompress", target, "-c", checkpoint, "--skip-existing").err


def test_what_a_file_loses_is_said(tmp_path: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("I;16", (8, 8), 30000).save(tmp_path / "gray.png")
    (tmp_path / "gray.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    command = ("compress", tmp_path, "-o", tmp_path / "coded", "-c", checkpoint)
    assert "would be written there" in hpcm(*command, code=1).err
    (tmp_path / "gray.ppm").rename(tmp_path / "deep.ppm")
    output = hpcm(*command, "--json")
    assert len(json.loads(output.out)) == 5
    printed = output.err
    for line in (
        "alpha.png: transparency was blended with white",
        "gray.png: 16 bits a channel became 8",
        "deep.ppm: 16 bits a channel became 8",
        "print.jpg: the color profile of the CMYK image was dropped because it is not for RGB",
    ):
        assert line in printed
    assert "plain.png:" not in printed
    assert CodedImage.read(tmp_path / "coded" / "print.hpcm").icc_profile == b""


def test_one_bad_file_does_not_stop_the_others(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    coded, decoded = photos.parent / "coded", photos.parent / "decoded"
    assert "broken.png: damaged" in hpcm("compress", photos, "-o", coded, "-c", checkpoint, code=1).err
    assert sorted(path.name for path in coded.rglob("*.hpcm")) == ["one.hpcm", "turned.hpcm"]

    data = (coded / "one.hpcm").read_bytes()
    (coded / "cut.hpcm").write_bytes(data[:-5])
    (coded / "newer.hpcm").write_bytes(data[:4] + b"\x07" + data[5:])
    (coded / "other.hpcm").write_bytes(CodedImage(b"somebody", 1, 1, b"z", b"y").pack())
    printed = hpcm("decompress", coded, "-o", decoded, "-c", checkpoint, code=1).err
    assert f"cut.hpcm: truncated: {len(data) - 5} of {len(data)} bytes" in printed
    assert "newer.hpcm: format version 7; this program reads version 2" in printed
    assert "other.hpcm: made by another model" in printed
    assert sorted(path.name for path in decoded.rglob("*.png")) == ["one.png", "turned.png"]
    hpcm("info", coded / "cut.hpcm", coded / "one.hpcm", code=1)


def test_whatever_one_file_makes_the_libraries_raise_the_next_is_coded(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    encode, errors = ImageCodec.encode, [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    Image.new("RGB", (64, 64)).save(photos / "two.png")
    monkeypatch.setattr(
        ImageCodec, "encode", lambda *image: (_ for _ in ()).throw(errors.pop()) if errors else encode(*image)
    )
    printed = hpcm("compress", photos, "-o", photos.parent / "coded", "-c", checkpoint, code=1).err
    assert "can't allocate memory" in printed
    assert "MemoryError" in printed
    assert len(list((photos.parent / "coded").rglob("*.hpcm"))) == 1


def test_an_image_beyond_the_memory_is_refused_and_the_next_is_coded(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    Image.new("L", (20_000, 1)).save(photos / "line.png")
    arguments = ("compress", photos, "-o", photos.parent / "coded", "-c", checkpoint)
    needed = 2 * coding_bytes(load_codec(checkpoint).config, padded_pixels(1, 20_000))
    monkeypatch.setattr(memory, "memory_limit", lambda: needed - 2)
    printed = hpcm(*arguments, code=1)
    assert "line.png: 20000×1 pixels, 2,572,288 with padding: coding needs 0." in printed.err
    assert "--max-pixels 2572288 allows it" in printed.err
    assert "one.hpcm" in printed.out
    assert "more than --max-pixels 16384" in hpcm(*arguments, "--overwrite", "--max-pixels", 16384, code=1).err
    coded = photos.parent / "coded" / "one.hpcm"
    printed = hpcm("decompress", coded, "-c", checkpoint, "--max-pixels", 16383, code=1).err
    assert "one.hpcm: 60×40 pixels, 16,384 with padding: more than --max-pixels 16383" in printed


def test_standard_input_and_output(photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm) -> None:
    def standard_input(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    standard_input((photos / "one.png").read_bytes())
    coded = hpcm("compress", "-", "-c", checkpoint)
    assert CodedImage.parse(coded.raw).width == 60
    assert "60×40" in coded.err
    standard_input(coded.raw)
    assert "60×40" in hpcm("info", "-").out
    standard_input((photos / "one.png").read_bytes())
    assert "standard-input" in hpcm("evaluate", "-", "-c", checkpoint).out
    standard_input(coded.raw)
    decoded = hpcm("decompress", "-", "-o", "-", "-c", checkpoint, "--quiet")
    assert Image.open(io.BytesIO(decoded.raw)).size == (60, 40)
    assert decoded.err == ""
    hpcm("compress", "-", photos / "one.png", "-c", checkpoint, code=2)
    hpcm("compress", photos, "-o", "-", "-c", checkpoint, code=2)
