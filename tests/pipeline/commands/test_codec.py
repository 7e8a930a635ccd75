"""`hpcm compress`, `decompress`, `info` and `evaluate` on the command line."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mini
import numpy as np
import pytest
import yaml
from compressai.utils.plot.__main__ import parse_json_file
from mini import mini_codec, mini_stage
from PIL import Image, ImageCms
from PIL.JpegImagePlugin import get_sampling
from skimage.data import coffee

from modules.bitstream.file_format import CodedImage, Header
from modules.image_codec import ImageCodec
from pipeline.common import memory
from pipeline.evaluation.limits import coding_bytes, padded_pixels
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage, Quality

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
Hpcm = Callable[..., Any]
"""The fixture `hpcm`: runs the command line, checks its exit code, and returns what it printed."""


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


def test_a_folder_is_compressed_and_decompressed(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    coded, decoded = photos.parent / "coded", photos.parent / "decoded"
    printed = hpcm("compress", photos, "-o", coded, "-c", checkpoint).out
    size = (coded / "one.hpcm").stat().st_size
    for text in (f"{8 * size / 2400:.4f}", "60×40", "40×60"):
        assert text in printed
    printed = hpcm("info", coded).out
    for text in (str(len(SRGB)), "2e-05", CodedImage.read(coded / "one.hpcm").identity.hex()):
        assert text in printed
    hpcm("decompress", coded, "-o", decoded, "-c", checkpoint)
    with Image.open(decoded / "one.png") as one, Image.open(decoded / "more" / "turned.png") as turned:
        assert (one.size, turned.size) == ((60, 40), (40, 60))
        assert "icc_profile" not in one.info
        assert turned.info["icc_profile"] == SRGB
        expected = ImageCodec(load_codec(checkpoint)).decode(CodedImage.read(coded / "one.hpcm")).x_hat
        assert np.array_equal(np.asarray(one), (expected[0] * 255).round().byte().permute(1, 2, 0).numpy())


def test_without_a_checkpoint_a_bundled_codec_is_used(tmp_path: Path, hpcm: Hpcm) -> None:
    photo, coded, back = (tmp_path / name for name in ("coffee.png", "coffee.hpcm", "back.png"))
    Image.fromarray(coffee()[100:228, 100:292]).save(photo)
    hpcm("compress", photo)
    hpcm("decompress", coded, "-o", back)
    assert "coffee.png" in hpcm("evaluate", photo).out
    assert "bundled control-0.0067.safetensors" in hpcm("info", coded).out
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
    hpcm("compress", source, "-c", checkpoint, "--quality", "1", code=2)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compress", "nothing.png", "-c", "codec"), "nothing.png: no such file or folder"),
        (("decompress", ".", "-c", "codec"), "no files with the suffix .hpcm in or below this folder"),
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
    printed = hpcm("compress", photos, "-c", checkpoint, "--skip-existing").out
    assert "skipped: 1 of " in printed
    assert "one.hpcm" not in printed
    assert target.read_bytes() == b"mine"
    assert (photos / "more" / "turned.hpcm").is_file()
    hpcm("compress", source, "-c", checkpoint, "--overwrite")
    assert CodedImage.read(target).width == 60


def deep_png() -> bytes:
    """An RGB image of 2 × 2 with 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = 2 * (b"\0" + struct.pack(">6H", *range(0, 60000, 10000)))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_what_a_file_loses_is_said(tmp_path: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("I;16", (8, 8), 30000).save(tmp_path / "gray.png")
    (tmp_path / "deep.png").write_bytes(deep_png())
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg", icc_profile=b"\0" * 16 + b"CMYK" + b"\0" * 108)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    command = ("compress", tmp_path, "-o", tmp_path / "coded", "-c", checkpoint)
    assert "would be written there" in hpcm(*command, code=1).err
    (tmp_path / "deep.ppm").rename(tmp_path / "deeper.ppm")
    printed = hpcm(*command).out
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


def test_forged_and_odd_files_are_refused_before_anything_is_allocated(
    checkpoint: Path, tmp_path: Path, hpcm: Hpcm
) -> None:
    identity = ImageCodec(load_codec(checkpoint)).identity
    thin = CodedImage(identity, 1, 2**26, b"z" * 12, b"y" * 13)
    (tmp_path / "thin.hpcm").write_bytes(thin.pack())
    header = Header(identity, 64, 64, 0, 0, 2**31)
    (tmp_path / "sparse.hpcm").write_bytes(header.pack())
    os.truncate(tmp_path / "sparse.hpcm", header.file_bytes)
    os.mkfifo(tmp_path / "pipe.hpcm")
    printed = hpcm("info", tmp_path, code=1).err
    assert "thin.hpcm: 67108864×1 pixels: images have 1 to 67108864 pixels, padding included" in printed
    assert "sparse.hpcm: 2147483690 bytes: far more than 64×64 pixels can have" in printed
    assert "pipe.hpcm: not a regular file" in printed


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


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(
    photos: Path, checkpoint: Path, hpcm: Hpcm
) -> None:
    coded = photos.parent / "one.hpcm"
    hpcm("compress", photos / "one.png", "-o", coded, "-c", checkpoint)
    (photos.parent / "victim").write_text("mine")
    (photos.parent / "one.png.partial").symlink_to(photos.parent / "victim")
    hpcm("decompress", coded, "-c", checkpoint)
    assert (photos.parent / "victim").read_text() == "mine"
    with Image.open(photos.parent / "one.png") as picture:
        assert picture.size == (60, 40)


def test_names_that_are_not_utf8_are_printed_anywhere(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"b\xff.hpcm")).write_bytes(CodedImage(b"somebody", 1, 1, b"z", y=bytes(33)).pack())
    (tmp_path / os.fsdecode(b"c\xff.hpcm")).touch()
    environment = {**mini.ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(mini.hpcm("info", tmp_path), env=environment, capture_output=True, timeout=240)
    assert done.returncode == 1
    assert b"b\\udcff.hpcm" in done.stdout
    assert b"c\\udcff.hpcm: truncated" in done.stderr


def test_evaluation_is_what_compressai_plots(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    large = np.random.default_rng(1).integers(0, 256, (170, 180, 3), dtype=np.uint8)
    Image.fromarray(large).save(photos / "large.png")
    output = photos.parent / "mini.json"
    printed = hpcm("evaluate", photos, "-c", checkpoint, "-o", output).out
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


def test_standard_input_and_output(photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm) -> None:
    def standard_input(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    standard_input((photos / "one.png").read_bytes())
    coded = hpcm("compress", "-", "-c", checkpoint)
    assert CodedImage.parse(coded.raw).width == 60
    assert "60×40" in coded.err
    standard_input(coded.raw)
    decoded = hpcm("decompress", "-", "-o", "-", "-c", checkpoint, "--quiet")
    assert Image.open(io.BytesIO(decoded.raw)).size == (60, 40)
    assert decoded.err == ""
    hpcm("compress", "-", photos / "one.png", "-c", checkpoint, code=2)
    hpcm("compress", photos, "-o", "-", "-c", checkpoint, code=2)


def test_the_codec_of_a_file_is_named_if_it_is_known(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    stage = photos.parent / "runs" / "mini" / "lmbda-0.013" / "baseline"
    publish(stage / "checkpoint.safetensors", mini_codec(0), Lineage(name="baseline"))
    image, runs = photos / "one.hpcm", ("--runs", photos.parent / "runs")
    hpcm("compress", photos / "one.png", "-c", stage)
    (found,) = json.loads(hpcm("info", image, "--json", *runs).out)
    assert found["checkpoint"] == str(stage / "checkpoint.safetensors")
    assert found["bytes"] == image.stat().st_size
    printed = hpcm("decompress", image, "-o", photos / "two.png", "-c", checkpoint, *runs, code=1).err
    assert f"made by another model: {found['checkpoint']}" in printed


def test_checkpoints_are_described(tmp_path: Path, hpcm: Hpcm) -> None:
    digest = None
    for number, name in enumerate(("baseline", "phase1")):
        stage = yaml.safe_dump(mini_stage(name).model_dump(mode="json"))
        lineage = Lineage(name, stage, inputs={"parent": digest} if digest else {}, quality=Quality(0.5, 30.5, None, 2))
        publish(tmp_path / name / "checkpoint.safetensors", mini_codec(number), lineage)
        digest = read_digest(tmp_path / name / "checkpoint.safetensors")
    printed = hpcm("info", tmp_path / "phase1").out
    assert "tiny, Phase 1, with settings of its own" in printed
    assert "0.5000 coded bpp, 30.50 dB, loss 2.0000" in printed
    (found,) = json.loads(hpcm("info", "--json", tmp_path / "phase1" / "checkpoint.safetensors").out)
    assert (found["stage"], found["parent"], found["phase"], found["lmbda"]) == ("phase1", "baseline", 1, 0.013)
    assert [line.split()[0] for line in found["lineage"]] == ["baseline", "phase1"]
    assert found["model"] == ImageCodec(load_codec(tmp_path / "phase1" / "checkpoint.safetensors")).identity.hex()
