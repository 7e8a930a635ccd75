"""`hpcm info` and `evaluate` on the command line."""

import json
import os
import subprocess
from pathlib import Path

import made
import mini
import numpy as np
import pytest
import yaml
from compressai.utils.plot.__main__ import parse_json_file
from mini import Hpcm, mini_codec, mini_stage
from PIL import Image

from modules.bitstream.file_format import CodedImage, Header
from modules.image_codec import ImageCodec
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage, Quality


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


def test_names_that_are_not_utf8_are_printed_anywhere(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"b\xff.hpcm")).write_bytes(CodedImage(b"somebody", 1, 1, b"z", y=bytes(33)).pack())
    (tmp_path / os.fsdecode(b"c\xff.hpcm")).touch()
    environment = {**mini.ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(mini.hpcm("info", tmp_path), env=environment, capture_output=True, timeout=240)
    assert done.returncode == 1
    assert b"b\\udcff.hpcm" in done.stdout
    assert b"c\\udcff.hpcm: truncated" in done.stderr


def test_the_codec_of_a_file_is_named_if_it_is_known(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    stage = photos.parent / "runs" / "mini" / "lmbda-0.013" / "baseline"
    publish(stage / "checkpoint.safetensors", mini_codec(0), Lineage(name="baseline"))
    image, runs = photos / "one.hpcm", ("--runs", photos.parent / "runs")
    hpcm("compress", photos / "one.png", "-c", stage)
    (found,) = json.loads(hpcm("info", image, "--json", *runs).out)
    assert found["checkpoint"] == str(stage / "checkpoint.safetensors")
    assert found["bytes"] == image.stat().st_size
    printed = hpcm("decompress", image, "-o", photos / "two.png", "-c", checkpoint, *runs, code=1).err
    assert f"made by another model: {found['checkpoint']}; give that model with -c, or no -c" in printed
    hpcm("decompress", image, "-o", photos / "two.png", *runs)
    image.write_bytes(CodedImage(b"somebody", 1, 1, b"z", b"y").pack())
    printed = hpcm("decompress", image, "-o", photos / "two.png", "--overwrite", *runs, code=1).err
    assert f"made by another model: {b'somebody'.hex()}, not bundled and not in {runs[1]}; give it with -c" in printed


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


def test_a_changed_checkpoint_is_named(tmp_path: Path, hpcm: Hpcm) -> None:
    path = tmp_path / "checkpoint.safetensors"
    publish(path, mini_codec(0), Lineage(name="baseline"))
    content = path.read_bytes()
    for place, said in ((-100, "the weights do not match their digest"), (200, str(path))):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert said in hpcm("info", tmp_path, code=1).err
    path.write_bytes(content)
    made.stage("baseline", 0.013, 0.5, 30.0).record.write(tmp_path)  # with the digest of no checkpoint
    assert f"{path}: not the checkpoint that was recorded in" in hpcm("info", tmp_path, code=1).err


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
