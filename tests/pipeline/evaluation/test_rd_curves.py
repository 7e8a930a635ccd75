"""Published curves: read from files, compared with what was measured, and drawn beside it."""

import json
from pathlib import Path

import pytest
from mini import Hpcm, mini_codec
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.evaluation.rd_curves import PUBLISHED, bd_rate, bd_rate_ms_ssim, read_curve
from pipeline.evidence.codec_comparison import CodecComparison, OperatingPoint, deltas_table, draw
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage, Quality

BASE, LARGE = PUBLISHED.values()
JSON = '{"name": "VTM", "results": {"bpp": [0.4, 0.2], "psnr-rgb": [33, 30], "ms-ssim-rgb": [0.99, 0.9]}}'


def scaled(curve: tuple[Quality, ...], rate: float) -> list[Quality]:
    return [Quality(point.bpp * rate, point.psnr_db, point.ms_ssim, 0.0) for point in curve]


def test_the_published_curves_are_those_of_the_paper() -> None:
    assert (BASE[0].bpp, BASE[-1].psnr_db, LARGE[0].psnr_db, LARGE[-1].bpp) == (0.1211, 37.7525, 28.9135, 0.7843)
    # The paper gives BD-rates of −15.3 and −19.2 % against VTM, so Large takes about 4.6 % less rate than Base.
    assert bd_rate(LARGE, BASE) == pytest.approx(-4.6, abs=0.5)


def test_curves_of_different_length_have_a_bd_rate() -> None:
    assert bd_rate(scaled(BASE, 0.9)[1:4], BASE) == pytest.approx(-10, abs=0.2)
    assert bd_rate(BASE[:1], BASE) is None
    assert bd_rate_ms_ssim(BASE, BASE) is None


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("vtm.json", JSON, "VTM"),
        ("vtm.csv", "bpp,psnr,ms-ssim\n0.2,30,0.9\n0.4,33,0.99\n", "vtm"),
        ("vtm.csv", "# by a paper\nPSNR; MS_SSIM; BPP\n30; 10; 0.2\n\n33; 20; 0.4\n", "vtm"),
        ("vtm.txt", "\ufeffrate\tpsnr\tmsssim\n0.2\t30\t10\n0.4\t33\t20\n", "vtm"),
    ],
)  # fmt: skip
def test_csv_and_json_give_the_same_curve(name: str, text: str, title: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    found, curve = read_curve(path)
    assert found == title
    assert [(point.bpp, point.psnr_db) for point in curve] == [(0.2, 30), (0.4, 33)]
    assert [point.ms_ssim for point in curve] == pytest.approx([0.9, 0.99])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("quality,psnr\n1,30\n", "no values of bpp"),
        ("bpp,psnr\n", "no values of bpp"),
        ("bpp,psnr\n0.2,thirty\n", "could not convert string to float: 'thirty'"),
        ("bpp,psnr\n0.2\n", "list index out of range"),
        ("bpp,psnr\n-0.2,30\n", "a value is negative or not finite"),
        ("bpp,psnr\n0.2,nan\n", "a value is negative or not finite"),
        ('{"bpp": [1]}', "'results'"),
        ('{"results": {"bpp": [0.1, 0.2], "psnr": [30]}}', "zip"),
        ('{"results": 3}', "has no attribute"),
        ('{"results":', "Expecting value"),
    ],
)
def test_a_file_without_a_curve_is_named_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(UserError, match=rf"odd.csv: not a curve \(.*{message}.*expected CSV with the columns"):
        read_curve(tmp_path / "odd.csv")
    with pytest.raises(UserError, match=r"nowhere.csv: no such file"):
        read_curve(tmp_path / "nowhere.csv")


def test_published_curves_are_drawn_and_compared() -> None:
    points = tuple(OperatingPoint(str(n), quality, ()) for n, quality in enumerate(scaled(BASE, 1.1)))
    comparison = CodecComparison(24, points, {}, {"hpcm-base-kodak": BASE})
    assert deltas_table(comparison).rows == [("hpcm-base-kodak", "6", "+10.00", "–")]
    lines = draw(comparison).axes[0].lines
    assert [line.get_label() for line in lines] == ["hpcm-base-kodak", "HPCM, this project"]
    assert list(lines[0].get_xdata()) == [point.bpp for point in BASE]


def test_evaluate_compares_with_a_file_and_a_published_curve(tmp_path: Path, hpcm: Hpcm) -> None:
    publish(tmp_path / "checkpoint.safetensors", mini_codec(0), Lineage(name="mini"))
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "gray.png")
    (tmp_path / "vtm.csv").write_text("bpp,psnr\n0.2,30\n0.4,33\n")
    plot, output = tmp_path / "curves.png", tmp_path / "values.json"
    command = ["evaluate", tmp_path / "gray.png", "-c", tmp_path, "--plot", plot, "-o", output]
    printed = hpcm(*command, "--against", f"{tmp_path / 'vtm.csv'},hpcm-large-kodak")
    assert "hpcm-large-kodak: measured on the 24 Kodak images, and these are others" in printed.err
    assert "BD-rate of our codecs" in printed.out
    assert plot.is_file()
    assert set(json.loads(output.read_text())["published"]) == {"vtm", "hpcm-large-kodak"}
    unknown = hpcm(*command, "--against", "hpcm-bas-kodak", code=1).err
    assert "there is no codec 'hpcm-bas-kodak'; expected some of jpeg,webp,avif" in unknown
