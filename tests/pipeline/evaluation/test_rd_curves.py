"""Published curves: read from files, and compared."""

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.rd_curves import PUBLISHED, bd_rate, bd_rate_ms_ssim, read_curve
from pipeline.weights.published import Quality

BASE, LARGE = PUBLISHED.values()
JSON = '{"name": "VTM", "results": {"bpp": [0.4, 0.2], "psnr-rgb": [33, 30], "ms-ssim-rgb": [0.99, 0.9]}}'


def test_the_published_curves_are_those_of_the_paper() -> None:
    assert (BASE[0].bpp, BASE[-1].psnr_db, LARGE[0].psnr_db, LARGE[-1].bpp) == (0.1211, 37.7525, 28.9135, 0.7843)
    # The paper gives BD-rates of −15.3 and −19.2 % against VTM, so Large takes about 4.6 % less rate than Base.
    assert bd_rate(LARGE, BASE) == pytest.approx(-4.6, abs=0.5)


def test_curves_of_different_length_have_a_bd_rate() -> None:
    fewer = [Quality(0.9 * point.bpp, point.psnr_db, None, 0.0) for point in BASE[1:4]]
    assert bd_rate(fewer, BASE) == pytest.approx(-10, abs=0.2)
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
