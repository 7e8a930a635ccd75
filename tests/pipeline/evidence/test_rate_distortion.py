"""Rate–distortion curves and the differences between them."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
from made import IMAGES, chain, changed, stage

from pipeline.commands import curves as drawing
from pipeline.evaluation.rd_curves import KODAK_NAMES, PUBLISHED, is_kodak
from pipeline.evidence import figures
from pipeline.evidence.rate_distortion import Curve, Point, curves, delta, deltas_table, differing_images
from pipeline.records.chains import RecordsError
from pipeline.weights.published import Quality

LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)


def published(rate: float = 1.0, gain_db: float = 0.0, count: int = 6) -> Curve:
    """The published curve with its rates scaled and its PSNR raised."""
    points = list(zip(LMBDAS, PUBLISHED["hpcm-base-kodak"], strict=True))[:count]
    return [Point(lmbda, Quality(p.bpp * rate, p.psnr_db + gain_db, None, 0.0), 1) for lmbda, p in points]


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_rate_scaled_everywhere_is_the_bd_rate(count: int) -> None:
    found = delta(published(0.9, count=count), published(count=count), "baseline")
    assert found.bd_rate == pytest.approx(-10, abs=1e-6)
    assert found.bd_psnr > 0
    assert found.points == count
    assert found.bd_rate_ms_ssim is None


def test_a_psnr_raised_everywhere_is_the_bd_psnr() -> None:
    found = delta(published(gain_db=0.3), published(), "baseline")
    assert found.bd_psnr == pytest.approx(0.3, abs=1e-6)
    assert found.bd_rate < 0


def test_only_lambdas_that_both_have_count() -> None:
    assert delta(published(0.9), published(count=3), "baseline").points == 3
    with pytest.raises(ValueError, match="1 λ in common with control4; a curve needs two or more"):
        delta(published(), published(count=1), "control4")


def test_curves_that_do_not_overlap_or_fold_back_give_no_figure() -> None:
    assert delta(published(gain_db=20), published(), "baseline").bd_rate is None
    folded = published()
    folded[2] = folded[4]
    assert delta(folded, published(), "baseline").bd_rate is None


def test_the_table_says_that_there_are_too_few_points() -> None:
    table = deltas_table({"control": published(count=1), "phase1": published(count=1)}, {"phase1": "control"})
    assert table.rows == [("phase1", "1 λ in common with control; a curve needs two or more", "–", "–", "–", "–")]


def test_curves_have_the_seeds_that_every_point_has() -> None:
    chains = [
        chain(lmbda, seed, stage("baseline", lmbda, bpp, 30, None))
        for lmbda, seed, bpp in ((0.0018, 0, 0.2), (0.013, 0, 0.5), (0.013, 1, 0.6))
    ]
    assert [(point.lmbda, point.seeds, point.quality.bpp) for point in curves(chains)["baseline"]] == [
        (0.0018, 1, 0.2),
        (0.013, 1, 0.5),
    ]
    assert [point.seeds for point in curves(chains[1:])["baseline"]] == [2]


def test_kodak_is_known_by_its_names() -> None:
    names = [f"kodak/{name}.png" for name in sorted(KODAK_NAMES)]
    assert is_kodak(names)
    assert not is_kodak(names[:-1])
    assert not is_kodak([*names[:-1], "other.png"])
    for kodak in (False, True):
        labels = [line.get_label() for line in figures.curves({"baseline": published()}, kodak).axes[0].lines]
        assert ("hpcm-base-kodak, published" in labels) == kodak


def test_points_of_different_validation_images_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [chain(lmbda, 0, stage("baseline", lmbda, 0.2, 30, None)) for lmbda in LMBDAS[:3]]
    assert differing_images(parts) == ""
    other = changed(stage("baseline", 0.013, 0.5, 30, None), val_images=replace(IMAGES, name="others", digest="1" * 64))
    parts[2] = chain(0.013, 0, other)
    monkeypatch.setattr(drawing, "read_chain", parts.__getitem__)
    named = r"1 of photos: baseline at λ = 0.0018, baseline at λ = 0.0035; 1 of others: baseline at λ = 0.013\. "
    with pytest.raises(RecordsError, match=named):
        drawing.draw_curves({"": [Mock(folder=number) for number in range(3)]})
