"""`hpcm compress` with an effort, or to a target."""

import json
import os
import signal
from pathlib import Path

import pytest
from mini import Hpcm
from PIL import Image
from skimage.data import coffee

from pipeline.commands.each_file import Refinement, each_file
from pipeline.evaluation import limits


def test_a_refined_image_is_smaller_and_its_file_is_an_ordinary_one(tmp_path: Path, hpcm: Hpcm) -> None:
    photo, plain, refined = (tmp_path / name for name in ("coffee.png", "plain.hpcm", "refined.hpcm"))
    Image.fromarray(coffee()[100:228, 100:228]).save(photo)
    hpcm("compress", photo, "-o", plain, "-c", "control-0.0067")
    hpcm("compress", photo, "-o", refined, "-c", "control-0.0067", "--effort", 1, "--lmbda", 1e-4, "--no-verify")
    assert refined.stat().st_size < plain.stat().st_size
    hpcm("decompress", refined, "-o", tmp_path / "back.png")
    rate = {}
    for effort in (0, 1):
        hpcm(
            "evaluate",
            photo,
            "-c",
            "control-0.0067",
            "--effort",
            effort,
            "--lmbda",
            1e-4,
            "-o",
            tmp_path / "results.json",
        )
        rate[effort] = json.loads((tmp_path / "results.json").read_text())["results"]["bpp"]
    assert rate[1] < rate[0]


def test_a_target_chooses_the_quality(tmp_path: Path, hpcm: Hpcm) -> None:
    photo, coded = tmp_path / "coffee.png", tmp_path / "coffee.hpcm"
    Image.fromarray(coffee()[100:228, 100:228]).save(photo)
    hpcm("compress", photo, "--bytes", 800)
    assert 0.99 * 800 <= coded.stat().st_size <= 800
    hpcm("decompress", coded, "-o", tmp_path / "back.png")
    printed = hpcm("compress", photo, "-o", tmp_path / "none.hpcm", "--bpp", 9, code=1)
    assert "9 bits per pixel cannot be reached" in printed.err
    assert not (tmp_path / "none.hpcm").exists()


def test_targets_that_contradict_or_are_no_numbers_are_refused(photos: Path, hpcm: Hpcm) -> None:
    assert "Invalid value for '--psnr'" in hpcm("compress", photos, "--psnr", "nan", code=2).err
    assert "give one of them" in hpcm("compress", photos, "--bytes", 800, "--psnr", 30, code=2).err


def test_an_effort_needs_lambda(photos: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    printed = hpcm("compress", photos, "-c", checkpoint, "--effort", 1, code=2)
    assert "the checkpoint does not name it; give --lmbda" in printed.err


def test_an_image_that_can_be_coded_but_not_refined_is_refused(
    photos: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setattr(limits, "refining_bytes", lambda config, pixels: 2**60 if pixels == 128**2 else 1)
    arguments = ("compress", photos / "one.png", "-c", checkpoint, "-o", photos.parent / "one.hpcm")
    assert "16,384 with padding: refining needs" in hpcm(*arguments, "--effort", 1, "--lmbda", 0.01, code=1).err
    hpcm(*arguments)


def test_a_target_needs_the_memory_of_a_refinement_only_beyond_the_qualities(
    photos: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setattr(limits, "refining_bytes", lambda *_: 2**60)
    hpcm("compress", photos / "one.png", "--bytes", 1500)
    assert "refining needs" in hpcm("compress", photos / "one.png", "--overwrite", "--bytes", 100, code=1).err


def test_the_first_interrupt_ends_the_refinement_and_no_other_file_is_begun(
    capsys: pytest.CaptureFixture[str],
) -> None:
    refinement, done = Refinement(completes=True), []

    def work(name: str) -> list[str]:
        assert refinement.go_on(0, 5)
        os.kill(os.getpid(), signal.SIGINT)
        assert not refinement.go_on(1, 5)
        done.append(name)
        return []

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        each_file([(Path("first"), "first"), (Path("second"), "second")], work, refinement)
    assert done == ["first"]
    assert "stopped at second; 1 of 2 files are done" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
