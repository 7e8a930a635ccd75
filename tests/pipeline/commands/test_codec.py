"""`hpcm compress`, `decompress`, `info` and `evaluate` on the command line."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import mini
import numpy as np
import pytest
import torch
from compressai.utils.plot.__main__ import parse_json_file
from mini import Notes, mini_codec
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import get_sampling
from skimage.data import coffee

from modules.bitstream.file_format import CodedImage, Header
from modules.image_codec import ImageCodec
from pipeline.chain.chain import Chain
from pipeline.commands import display
from pipeline.commands import main as cli
from pipeline.common import memory
from pipeline.evaluation.limits import coding_bytes, padded_pixels
from pipeline.evidence.bench_codec import Products, bench_codec, results_table
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.published import Lineage, publish

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "checkpoint.safetensors"
    publish(path, mini_codec(4), Lineage(name="mini"))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a photograph, another one with a profile and an orientation below it, and a file without image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "more" / "turned.jpg", exif=exif, icc_profile=SRGB)
    (folder / "notes.txt").write_text("no image")
    return folder


def hpcm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["hpcm", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_a_folder_there_and_back(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, decoded = photos.parent / "coded", photos.parent / "decoded"
    assert hpcm(monkeypatch, "compress", photos, "-o", coded, "-c", checkpoint) == 0
    printed = capsys.readouterr().out
    size = (coded / "one.hpcm").stat().st_size
    assert f"{8 * size / 2400:.4f}" in printed
    assert "60×40" in printed
    assert "40×60" in printed

    assert hpcm(monkeypatch, "info", coded) == 0
    printed = capsys.readouterr().out
    assert str(len(SRGB)) in printed
    assert "2e-05" in printed
    assert CodedImage.read(coded / "one.hpcm").identity.hex() in printed

    assert hpcm(monkeypatch, "decompress", coded, "-o", decoded, "-c", checkpoint) == 0
    with Image.open(decoded / "one.png") as one, Image.open(decoded / "more" / "turned.png") as turned:
        assert one.size == (60, 40)
        assert turned.size == (40, 60)
        assert "icc_profile" not in one.info
        assert turned.info["icc_profile"] == SRGB
        expected = ImageCodec(load_codec(checkpoint)).decode(CodedImage.read(coded / "one.hpcm")).x_hat
        assert np.array_equal(np.asarray(one), (expected[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_without_a_checkpoint_the_shipped_codec_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, coded, back = (tmp_path / name for name in ("coffee.png", "coffee.hpcm", "back.png"))
    Image.fromarray(coffee()[100:300, 100:400]).save(photo)
    assert hpcm(monkeypatch, "compress", photo) == 0
    assert hpcm(monkeypatch, "decompress", coded, "-o", back) == 0
    assert hpcm(monkeypatch, "evaluate", photo) == 0
    assert hpcm(monkeypatch, "info", coded) == 0
    assert "bundled control-0.0067.safetensors" in capsys.readouterr().out
    error = np.asarray(Image.open(photo), dtype=float) - np.asarray(Image.open(back), dtype=float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 28
    assert coded.stat().st_size < 300 * 200 / 8  # 1 bit per pixel


def test_for_those_who_know_better(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sizes = photos / "one.png", []
    for epsilon in ("0", "0.001"):
        target = photos / f"{epsilon}.hpcm"
        options = ("-c", checkpoint, "--epsilon", epsilon, "--no-verify")
        assert hpcm(monkeypatch, "compress", source, "-o", target, *options) == 0
        assert "–" in capsys.readouterr().out  # no PSNR: it was not decoded
        sizes.append(target.stat().st_size)
        guards = CodedImage.read(target).guards
        assert guards is not None
        assert (guards.epsilon, guards.guard_bytes > 0) == (pytest.approx(float(epsilon)), epsilon != "0")
    assert sizes[0] < sizes[1]
    assert hpcm(monkeypatch, "compress", source, "--epsilon", "0.1") == 2
    assert hpcm(monkeypatch, "compress", source, "-c", checkpoint, "--quality", "1") == 2


def test_one_file_to_the_name_given(photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = photos / "renamed.hpcm"
    assert hpcm(monkeypatch, "compress", photos / "one.png", "-o", target, "-c", checkpoint) == 0
    decoded = {}
    for suffix in ("png", "webp", "jpg"):
        back = photos / f"back.{suffix}"
        assert hpcm(monkeypatch, "decompress", target, "-o", back, "-c", checkpoint) == 0
        with Image.open(back) as image:
            decoded[image.format] = np.asarray(image)
            if suffix == "jpg":
                assert get_sampling(image) == 0  # color in full resolution
                assert max(image.quantization[0]) < 13  # quality 95
    assert decoded["PNG"].shape == decoded["JPEG"].shape == (40, 60, 3)
    assert np.array_equal(decoded["PNG"], decoded["WEBP"])


@pytest.mark.parametrize(("source", "name"), [("one.png", "one.jpg"), (".", "all.hpcm")])
def test_outputs_that_cannot_be_meant_are_refused(
    source: str,
    name: str,
    photos: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert hpcm(monkeypatch, "compress", photos / source, "-o", photos / name, "-c", checkpoint) == 1
    assert f"{name}: " in capsys.readouterr().err
    assert not (photos / name).exists()


def test_products_are_those_of_the_codec_and_run_alone() -> None:
    model = mini_codec(2).eval()
    model.update()
    encoding = Products(torch.device("cpu"))
    with encoding:
        model.compress(torch.rand(1, 3, 64, 64))
    called = Counter(str(func) for func, *_ in encoding.calls)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in (*model.g_a.modules(), *model.h_a.modules()))
    assert called["aten.convolution.default"] > convolutions
    assert called["aten.mm.default"] > 0
    again = Products(torch.device("cpu"))
    with again:
        encoding.replay()
    assert again.calls == encoding.calls

    results = bench_codec(model, (64, 128), rounds=1)
    assert [result.direction for result in results] == ["encode", "decode"]
    assert all(result.seconds and result.products and result.memory for result in results)
    assert [row[0] for row in results_table(results, "here").rows] == ["encode", "decode"]


def test_beside_the_source_and_nothing_replaced_unasked(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = photos / "one.png", photos / "one.hpcm"
    target.write_bytes(b"mine")
    assert hpcm(monkeypatch, "compress", source, "-c", checkpoint) == 1
    assert "one.hpcm: exists; --overwrite replaces it" in capsys.readouterr().err
    assert target.read_bytes() == b"mine"
    assert hpcm(monkeypatch, "compress", source, "-c", checkpoint, "--overwrite") == 0
    assert CodedImage.read(target).width == 60


def deep_png() -> bytes:
    """An RGB image of 2 × 2 with 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = 2 * (b"\0" + struct.pack(">6H", *range(0, 60000, 10000)))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_a_file_loses_is_said(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("I;16", (8, 8), 30000).save(tmp_path / "gray.png")
    (tmp_path / "deep.png").write_bytes(deep_png())
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert hpcm(monkeypatch, "compress", tmp_path, "-o", tmp_path / "coded", "-c", checkpoint) == 1
    assert "would be written there" in capsys.readouterr().err
    (tmp_path / "deep.ppm").rename(tmp_path / "deeper.ppm")
    assert hpcm(monkeypatch, "compress", tmp_path, "-o", tmp_path / "coded", "-c", checkpoint) == 0
    printed = capsys.readouterr().out
    for line in (
        "alpha.png: transparency was blended with white",
        "gray.png: 16 bits a channel became 8",
        "deep.png: 16 bits a channel became 8",
        "deeper.ppm: 16 bits a channel became 8",
        "print.jpg: the color profile of the CMYK image was dropped because it is not for RGB",
    ):
        assert line in printed
    assert "plain.png:" not in printed
    assert CodedImage.read(tmp_path / "coded" / "print.hpcm").icc_profile == b""


def test_one_bad_file_does_not_stop_the_others(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    coded, decoded = photos.parent / "coded", photos.parent / "decoded"
    assert hpcm(monkeypatch, "compress", photos, "-o", coded, "-c", checkpoint) == 1
    assert "broken.png: damaged" in capsys.readouterr().err
    assert sorted(path.name for path in coded.rglob("*.hpcm")) == ["one.hpcm", "turned.hpcm"]

    data = (coded / "one.hpcm").read_bytes()
    (coded / "cut.hpcm").write_bytes(data[:-5])
    (coded / "newer.hpcm").write_bytes(data[:4] + b"\x07" + data[5:])
    (coded / "other.hpcm").write_bytes(CodedImage(b"somebody", 1, 1, b"z", b"y").pack())
    assert hpcm(monkeypatch, "decompress", coded, "-o", decoded, "-c", checkpoint) == 1
    told = capsys.readouterr().err
    assert f"cut.hpcm: truncated: {len(data) - 5} of {len(data)} bytes" in told
    assert "newer.hpcm: format version 7; this program reads version 2" in told
    assert "other.hpcm: made by another model" in told
    assert sorted(path.name for path in decoded.rglob("*.png")) == ["one.png", "turned.png"]
    assert hpcm(monkeypatch, "info", coded / "cut.hpcm", coded / "one.hpcm") == 1


def test_forged_and_odd_files_are_refused_before_anything_is_allocated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = ImageCodec(load_codec(checkpoint)).identity
    thin = CodedImage(identity, 1, 2**26, b"z" * 12, b"y" * 13)
    (tmp_path / "thin.hpcm").write_bytes(thin.pack())
    header = Header(identity, 64, 64, 0, 0, 2**31)
    (tmp_path / "sparse.hpcm").write_bytes(header.pack())
    os.truncate(tmp_path / "sparse.hpcm", header.file_bytes)
    os.mkfifo(tmp_path / "pipe.hpcm")
    assert hpcm(monkeypatch, "info", tmp_path) == 1
    told = capsys.readouterr().err
    assert "thin.hpcm: 67108864×1 pixels: images have 1 to 67108864 pixels, padding included" in told
    assert "sparse.hpcm: 2147483690 bytes: far more than 64×64 pixels can have" in told
    assert "pipe.hpcm: not a regular file" in told


def test_an_image_beyond_the_memory_is_refused_and_the_next_is_coded(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (20_000, 1)).save(photos / "line.png")
    arguments = ("compress", photos, "-o", photos.parent / "coded", "-c", checkpoint)
    needed = 2 * coding_bytes(load_codec(checkpoint).config, padded_pixels(1, 20_000))
    monkeypatch.setattr(memory, "memory_limit", lambda: needed - 2)
    assert hpcm(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert "line.png: 20000×1 pixels, 2,572,288 with padding: coding needs 0." in printed.err
    assert "--max-pixels 2572288 allows it" in printed.err
    assert "one.hpcm" in printed.out
    assert hpcm(monkeypatch, *arguments, "--overwrite", "--max-pixels", 16384) == 1
    assert "more than --max-pixels 16384" in capsys.readouterr().err
    coded = photos.parent / "coded" / "one.hpcm"
    assert hpcm(monkeypatch, "decompress", coded, "-c", checkpoint, "--max-pixels", 16383) == 1
    assert "one.hpcm: 60×40 pixels, 16,384 with padding: more than --max-pixels 16383" in capsys.readouterr().err


def test_whatever_one_file_makes_the_libraries_raise_the_next_is_coded(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode, errors = ImageCodec.encode, [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    Image.new("RGB", (64, 64)).save(photos / "two.png")
    monkeypatch.setattr(
        ImageCodec, "encode", lambda *image: (_ for _ in ()).throw(errors.pop()) if errors else encode(*image)
    )
    assert hpcm(monkeypatch, "compress", photos, "-o", photos.parent / "coded", "-c", checkpoint) == 1
    told = capsys.readouterr().err
    assert "can't allocate memory" in told
    assert "MemoryError" in told
    assert len(list((photos.parent / "coded").rglob("*.hpcm"))) == 1


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = photos.parent / "one.hpcm"
    assert hpcm(monkeypatch, "compress", photos / "one.png", "-o", coded, "-c", checkpoint) == 0
    (photos.parent / "victim").write_text("mine")
    (photos.parent / "one.png.partial").symlink_to(photos.parent / "victim")
    assert hpcm(monkeypatch, "decompress", coded, "-c", checkpoint) == 0
    assert (photos.parent / "victim").read_text() == "mine"
    with Image.open(photos.parent / "one.png") as picture:
        assert picture.size == (60, 40)


@pytest.mark.parametrize("encoding", ["utf-8:strict", pytest.param("ascii:strict", marks=pytest.mark.slow)])
def test_names_that_are_not_utf8_are_printed_anywhere(encoding: str, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"b\xff.hpcm")).write_bytes(CodedImage(b"somebody", 1, 1, b"z", y=bytes(33)).pack())
    (tmp_path / os.fsdecode(b"c\xff.hpcm")).touch()
    environment = {**mini.ENVIRONMENT, "PYTHONIOENCODING": encoding}
    done = subprocess.run(mini.hpcm("info", tmp_path), env=environment, capture_output=True, timeout=240)
    assert done.returncode == 1
    assert b"b\\udcff.hpcm" in done.stdout
    assert b"c\\udcff.hpcm: truncated" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nothing.png", "-c", "codec"), "nothing.png: no such file or folder"),
        (("decompress", ".", "-c", "codec"), "no files with the suffix .hpcm in or below this folder"),
        (("compress", "one.png", "-c", "nowhere"), "nowhere: no such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos)
    assert hpcm(monkeypatch, *arguments) == 1
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_an_unknown_picture_format_is_refused(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hpcm(monkeypatch, "compress", photos / "one.png", "-c", checkpoint) == 0
    assert hpcm(monkeypatch, "decompress", photos / "one.hpcm", "-o", photos / "one.pdf", "-c", checkpoint) == 1
    assert "unknown format; give a name that ends in one of .png" in capsys.readouterr().err


def test_evaluation_is_what_compressai_plots(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = np.random.default_rng(1).integers(0, 256, (170, 180, 3), dtype=np.uint8)
    Image.fromarray(large).save(photos / "large.png")
    output = photos.parent / "mini.json"
    assert hpcm(monkeypatch, "evaluate", photos, "-c", checkpoint, "-o", output) == 0
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert [image["source"] for image in written["images"]] == ["large.png", "more/turned.jpg", "one.png"]
    for key in ("bpp", "psnr-rgb", "encoding_time", "decoding_time"):
        mean = np.mean([image[key] for image in written["images"]])
        assert written["results"][key] == [pytest.approx(mean)]
    assert [image["ms-ssim-rgb"] is None for image in written["images"]] == [False, True, True]
    assert written["results"]["ms-ssim-rgb"] == [written["images"][0]["ms-ssim-rgb"]]
    assert f"{written['results']['bpp'][0]:.4f}" in printed
    for metric in ("psnr", "ms-ssim"):
        curve = parse_json_file(output, metric)
        assert curve["name"] == "mini"
        assert len(curve["xs"]) == len(curve["ys"]) == 1


def test_standard_input_and_output(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((photos / "one.png").read_bytes())))
    assert hpcm(monkeypatch, "compress", "-", "-c", checkpoint) == 0
    coded = capsysbinary.readouterr()
    assert CodedImage.parse(coded.out).width == 60
    assert "60×40".encode() in coded.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(coded.out)))
    assert hpcm(monkeypatch, "decompress", "-", "-o", "-", "-c", checkpoint, "--quiet") == 0
    decoded = capsysbinary.readouterr()
    assert Image.open(io.BytesIO(decoded.out)).size == (60, 40)
    assert decoded.err == b""
    display.console.quiet = display.errors.quiet = False
    assert hpcm(monkeypatch, "compress", "-", photos / "one.png", "-c", checkpoint) == 2
    assert hpcm(monkeypatch, "compress", photos, "-o", "-", "-c", checkpoint) == 2


def test_what_was_coded_before_is_left_out_on_request(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "one.hpcm").write_bytes(b"mine")
    assert hpcm(monkeypatch, "compress", photos, "-c", checkpoint, "--skip-existing") == 0
    printed = capsys.readouterr().out
    assert "skipped: 1 of " in printed
    assert "one.hpcm" not in printed
    assert (photos / "one.hpcm").read_bytes() == b"mine"
    assert (photos / "more" / "turned.hpcm").is_file()


def test_the_codec_of_a_file_is_named_where_it_is_known(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = photos.parent / "runs" / "mini" / "lmbda-0.013" / "baseline"
    publish(stage / "checkpoint.safetensors", mini_codec(0), Lineage(name="baseline"))
    image, runs = photos / "one.hpcm", ("--runs", photos.parent / "runs")
    assert hpcm(monkeypatch, "compress", photos / "one.png", "-c", stage) == 0
    capsys.readouterr()
    assert hpcm(monkeypatch, "info", image, "--json", *runs) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(stage / "checkpoint.safetensors")
    assert found["bytes"] == image.stat().st_size
    assert hpcm(monkeypatch, "decompress", image, "-o", photos / "two.png", "-c", checkpoint, *runs) == 1
    assert f"made by another model: {found['checkpoint']}" in capsys.readouterr().err


def test_checkpoints_are_described(
    finished: tuple[Chain, Notes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[0].folder / "phase2"
    assert hpcm(monkeypatch, "info", folder) == 0
    printed = capsys.readouterr().out
    assert "tiny, Phase 2, with settings of its own" in printed
    assert hpcm(monkeypatch, "info", "--json", folder / "checkpoint.safetensors") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["stage"], found["parent"], found["phase"], found["lmbda"]) == ("phase2", "phase1", 2, 0.013)
    assert [line.split()[0] for line in found["lineage"]] == ["baseline", "phase1", "phase2"]
    assert found["model"] == ImageCodec(load_codec(folder / "checkpoint.safetensors")).identity.hex()
    assert f"{found['quality']['psnr_db']:.2f} dB" in printed
