"""`hpcm compress` at any quality, with an effort, or to a target."""

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

CONTROL = ("-c", "control-0.0067", "--lmbda", 1e-4)
"""A codec of one rate, refined for a λ at which few iterations make a large difference."""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(coffee()[100:228, 100:228]).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def test_a_photograph_is_coded_at_any_quality_and_decoded(photo: Path, hpcm: Hpcm) -> None:
    sizes = []
    for options in ((1,), (1.5,), (2,), (2, "--effort", 1)):
        coded = photo.with_name(f"{len(sizes)}.hpcm")
        hpcm("compress", photo, "-o", coded, "--no-verify", "--quality", *options)
        hpcm("decompress", coded)
        assert Image.open(coded.with_suffix(".png")).size == (128, 128)
        sizes.append(coded.stat().st_size)
    assert sizes[:3] == sorted(set(sizes[:3]))
    assert "0.0018, 0.0067, 0.013, 0.0483" in hpcm("info", "variable").out


def test_evaluate_measures_every_rate(photo: Path, hpcm: Hpcm) -> None:
    output = photo.with_name("results.json")
    assert "quality 3, λ = 0.013" in hpcm("evaluate", photo, "-o", output).out
    rates = json.loads(output.read_text())["results"]["bpp"]
    assert rates == sorted(set(rates))
    assert len(rates) == 4


def test_a_refined_image_is_smaller_and_its_file_is_an_ordinary_one(photo: Path, hpcm: Hpcm) -> None:
    sizes, rates = [], []
    for effort in (0, 1):
        coded, output = photo.with_name(f"{effort}.hpcm"), photo.with_name("results.json")
        hpcm("compress", photo, "-o", coded, *CONTROL, "--effort", effort, "--no-verify")
        hpcm("evaluate", photo, "-o", output, *CONTROL, "--effort", effort)
        sizes.append(coded.stat().st_size)
        rates.append(json.loads(output.read_text())["results"]["bpp"])
    assert sizes[1] < sizes[0]
    assert rates[1] < rates[0]
    hpcm("decompress", coded)


def test_a_target_chooses_the_quality(photo: Path, hpcm: Hpcm) -> None:
    hpcm("compress", photo, "--bytes", 800)
    assert 0.99 * 800 <= photo.with_suffix(".hpcm").stat().st_size <= 800
    hpcm("decompress", photo.with_suffix(".hpcm"), "-o", photo.with_name("back.png"))
    printed = hpcm("compress", photo, "-o", photo.with_name("none.hpcm"), "--bpp", 9, code=1)
    assert "9 bits per pixel cannot be reached" in printed.err
    assert not photo.with_name("none.hpcm").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bytes", 800, "--psnr", 30), "give one of them"),
        (("--psnr", "nan"), "Invalid value for '--psnr'"),
        (("--quality", 2, "--bytes", 900), "choose the quality"),
        (("--quality", 5), "quality 5: this codec has qualities from 1 to 4"),
        (("--lmbda", 0.01), "refines for the λ of its quality"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[object, ...], message: str, photo: Path, hpcm: Hpcm
) -> None:
    assert message in hpcm("compress", photo, *options, code=2).err


def test_an_effort_needs_lambda(photo: Path, checkpoint: Path, hpcm: Hpcm) -> None:
    printed = hpcm("compress", photo, "-c", checkpoint, "--effort", 1, code=2)
    assert "the checkpoint does not name it; give --lmbda" in printed.err


def test_an_image_that_can_be_coded_but_not_refined_is_refused(
    photo: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setattr(limits, "refining_bytes", lambda config, pixels: 2**60 if pixels == 128**2 else 1)
    arguments = ("compress", photo, "-c", checkpoint)
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
