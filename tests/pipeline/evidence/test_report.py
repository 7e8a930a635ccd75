"""The page that `hpcm report` writes, and its computed figures."""

import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mini import STAGES, Notes
from PIL import Image
from typer.testing import CliRunner

from pipeline.chain.acceptance import judge
from pipeline.chain.chain import Chain
from pipeline.commands.main import app
from pipeline.evaluation.coding import comparison_name
from pipeline.evidence import comparison, frontier_figure, gains_figure, report
from pipeline.evidence.comparison import Comparison, Cost, Peak
from pipeline.evidence.control_gains import Spread, claims, gains
from pipeline.evidence.rate_distortion import curves, deltas, deltas_table, references, uncontrolled
from pipeline.evidence.reconstructions import DARKEST, compared_crops, error_map
from pipeline.evidence.report import ReportError, write
from pipeline.evidence.report_tables import quality_table
from pipeline.recipes.schema import Accept
from pipeline.tracking.records import ChainRecord, Records, SegmentRecord, StageRecord
from pipeline.tracking.tags import StageTags
from pipeline.weights.published import Quality

LMBDA_SCALE = 255**2


def stage(name: str, lmbda: float, bpp: float, psnr_db: float, parent: str | None = "baseline") -> StageRecord:
    """A published stage of 10 steps with this quality, and the loss that follows from it."""
    loss = bpp + lmbda * LMBDA_SCALE * 10 ** (-psnr_db / 10)
    phase = name[-1] if name.startswith("phase") else "4" if name == "lean" else "0"
    return StageRecord(
        name, "FINISHED", 1,
        {"parent": str(parent), "metric": "mse", "model.preset": "tiny", "model.phase": phase, "codec.phase": phase},
        {"final/bpp": bpp, "final/psnr_db": psnr_db, "final/rd_loss": loss},
        StageTags(stage=name, checkpoint_digest=name),
        (SegmentRecord("unfrozen", "rate-distortion", 10, 0, {}, 1.0, loss),),
    )  # fmt: skip


def chain(lmbda: float, seed: int, *stages: StageRecord) -> ChainRecord:
    return ChainRecord(f"{lmbda}-{seed}", "FINISHED", "made", lmbda, seed, stages)


@pytest.fixture(scope="module")
def made() -> list[ChainRecord]:
    """Two λ, the second with two seeds; Phase 4 takes 5 % less rate than its control at the same PSNR."""
    chains = []
    for lmbda, seed, bpp, psnr in ((0.0018, 0, 0.2, 28.0), (0.013, 0, 0.5, 32.0), (0.013, 1, 0.52, 32.1)):
        control = stage("control4", lmbda, bpp, psnr)
        phase4 = stage("phase4", lmbda, bpp * (0.95 if seed == 0 else 0.93), psnr)
        chains.append(chain(lmbda, seed, stage("baseline", lmbda, bpp * 1.1, psnr, None), control, phase4))
    return chains


def test_each_stage_is_judged_against_what_had_as_many_steps() -> None:
    parents = {
        "baseline": None, "control1": "baseline", "control2": "control1", "phase1": "baseline", "phase2": "phase1",
        "phase3": "phase2", "lean": "baseline",
    }  # fmt: skip
    whole = chain(0.013, 0, *(stage(name, 0.013, 0.5, 32, parent) for name, parent in parents.items()))
    assert next(iter(whole.published)) == "baseline"
    assert {name: whole.reference(name) for name in parents} == {
        "baseline": None, "control1": None, "control2": None, "phase1": "control1", "phase2": "control2",
        "phase3": "baseline", "lean": "control1",
    }  # fmt: skip
    assert {gain.stage: gain.fair for gain in gains([whole])} == {
        "phase1": True, "phase2": True, "phase3": False, "lean": True,
    }  # fmt: skip


def test_gains_are_paired_by_seed(made: list[ChainRecord]) -> None:
    found = {(gain.stage, gain.lmbda): gain for gain in gains(made)}
    assert set(found) == {("phase4", 0.0018), ("phase4", 0.013)}
    gain = found["phase4", 0.013]
    assert gain.reference == "control4"
    assert gain.rate_percent.mean == pytest.approx(-6)
    assert gain.rate_percent.deviation == pytest.approx(math.sqrt(2))
    assert found["phase4", 0.0018].rate_percent == Spread(pytest.approx(-5), None, 1)


def test_the_frontier_shows_rate_against_multiplications() -> None:
    stages = [stage("baseline", 0.013, 0.55, 32, None), stage("control", 0.013, 0.5, 32)]
    stages += [stage("lean", 0.013, 0.51, 32), stage("phase4", 0.013, 0.49, 32)]
    for each, kmacs in zip(stages, (30, 30, 18, 45), strict=True):
        each.metrics["model/kmacs_per_pixel"] = kmacs  # type: ignore[index]
    made = chain(0.013, 0, *stages)
    (axis,) = frontier_figure.draw(made, gains([made])).axes
    drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist()[0] for bars in axis.containers}
    assert drawn == {"lean": pytest.approx([0.6, 2]), "phase4": pytest.approx([1.5, -2])}


def test_gains_are_drawn_by_stage_and_lmbda(made: list[ChainRecord]) -> None:
    (axis,) = gains_figure.draw(gains(made)).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["phase4"]
    points = {bars.get_label(): bars.lines[0].get_xdata() for bars in axis.containers[1:]}
    assert points.keys() == {"λ = 0.0018", "λ = 0.013"}
    assert points["λ = 0.013"] == pytest.approx([-6])
    (band,) = axis.containers[0]
    assert (band.get_x(), band.get_width()) == (-8, 3)


def test_rate_and_psnr_are_along_the_controls_curve() -> None:
    chains = [
        chain(lmbda, 0, stage("baseline", lmbda, 1, 20, None), stage("control1", lmbda, bpp, psnr),
              stage("phase1", lmbda, bpp - 0.02, psnr - 0.4))
        for lmbda, bpp, psnr in ((0.0018, 0.2, 28.0), (0.013, 0.4, 32.0))
    ]  # fmt: skip
    # 20 dB a bit: of 0.4 dB at equal PSNR 0.02 bits.
    assert [gain.rate_percent.mean for gain in gains(chains)] == pytest.approx([0, 0], abs=1e-9)
    assert [gain.psnr_at_equal_rate.mean for gain in gains(chains)] == pytest.approx([0, 0], abs=1e-9)


def test_of_one_lmbda_the_loss_gives_the_slope(made: list[ChainRecord]) -> None:
    (gain,) = gains(made[:1])
    small = 1e-6
    mse = 10**-2.8
    slope = -10 * math.log10(1 - small / (0.0018 * LMBDA_SCALE * mse)) / small  # of a distortion that is worth `small`
    assert gain.rate_percent.mean == pytest.approx(-5)
    assert gain.psnr_at_equal_rate.mean == pytest.approx(0.01 * slope, rel=1e-3)


def test_what_is_far_from_its_reference_has_no_rate_at_its_psnr() -> None:
    alone = [chain(0.013, 0, stage("baseline", 0.013, 0.5, 32, None), stage("control1", 0.013, 0.5, 30),
                   stage("phase1", 0.013, 0.4, 32))]  # fmt: skip
    (gain,) = gains(alone)
    assert gain.loss.mean < 0
    assert (gain.rate_percent, gain.psnr_at_equal_rate) == (None, None)


def cost_of(ratio: float) -> Comparison:
    """A comparison in which Phase 4 takes this many times the Baseline's time, and half its memory."""
    codecs = {"baseline": 1.0, "phase4": ratio}
    costs = [
        Cost(codec, "512×768", activity, factor, factor, (factor, 2 * factor, 4 * factor))
        for codec, factor in codecs.items()
        for activity in ("forward", "encode", "decode", "unfrozen")
    ]
    peaks = [
        Peak(codec, "512×768", activity, size)
        for codec, size in (("baseline", 200), ("phase4", 100))
        for activity in ("decode", "unfrozen")
    ]
    counts = {"baseline": 10, "phase4": 20}
    kmacs = {"baseline": 1.0, "phase4": 2.0}
    return Comparison("mini", "cpu", "a machine", "2", 3, False, counts, kmacs, (*costs,), (*peaks,))


def test_claims_stand_beside_what_was_measured(made: list[ChainRecord]) -> None:
    found = {
        (c.quantity, c.phase): c for c in claims(gains(made), deltas(curves(made), references(made)), cost_of(0.7))
    }
    phase4 = {quantity: claim for (quantity, phase), claim in found.items() if phase == 4}
    time = phase4["time, encode and decode at 512×768"]
    assert time.expected == (-55, -40)
    assert time.measured == Spread(pytest.approx(-30), pytest.approx(0), 3)
    assert time.holds is False
    assert phase4["memory, training step at 512×768"].measured == Spread(-50, None, 1)
    assert phase4["memory, training step at 512×768"].holds is True
    assert phase4["rate, at λ = 0.013"].measured == Spread(pytest.approx(-6), pytest.approx(math.sqrt(2)), 2)
    assert phase4["rate, BD over all λ"].holds is True
    assert phase4["rate, BD over all λ"].measured.mean == pytest.approx(-5.5, abs=0.5)
    assert phase4["psnr, at λ = 0.013"].measured.mean > 0
    assert found["time, training step at 512×768", 1].measured is None
    assert found["time, training step at 512×768", 1].holds is None


@pytest.mark.parametrize(("title", "counts"), [("made", True), ("checkpoints", True), ("tiny", False)])
def test_costs_are_those_of_the_recipes_own_codecs(made: list[ChainRecord], title: str, counts: bool) -> None:
    found = report._claims(made, curves(made), {(title, "cpu"): cost_of(0.7)})
    assert any(quantity.startswith("time") for quantity in found) is counts


def test_what_had_fewer_steps_is_no_fair_reference() -> None:
    alone = [chain(0.013, 0, stage("baseline", 0.013, 0.5, 32, None), stage("phase1", 0.013, 0.4, 32))]
    (gain,) = gains(alone)
    assert (gain.fair, gain.rate_percent, gain.psnr_at_equal_rate) == (False, None, None)
    rate = {(c.quantity, c.phase): c for c in claims([gain], {}, None)}["rate, at λ = 0.013", 1]
    assert (rate.measured, rate.holds) == (None, None)
    assert report._claim_text(rate) == "no control"
    assert quality_table(alone).rows[1][2:6] == ("no control", "1", "–", "–")
    (row,) = deltas_table(curves(alone), references(alone), uncontrolled(alone)).rows
    assert row == ("phase1", "no control: baseline was trained for another number of steps", *["–"] * 4)


def test_the_stage_table_has_error_bars(made: list[ChainRecord]) -> None:
    rows = {(row[0], row[1]): row for row in quality_table(made).rows}
    assert rows["0.013", "phase4"][2:4] == ("control4", "2")
    assert rows["0.013", "phase4"][5] == "-6.00 ± 1.41"
    assert rows["0.0018", "phase4"][5] == "-5.00"
    assert rows["0.013", "control4"][5] == "–"


def test_curves_are_of_the_seeds_that_every_point_has(made: list[ChainRecord]) -> None:
    points = curves(made)["phase4"]
    assert [(point.lmbda, point.seeds) for point in points] == [(0.0018, 1), (0.013, 1)]
    assert points[1].quality.bpp == pytest.approx(0.475)
    assert [point.seeds for point in curves(made[1:])["phase4"]] == [2]


def test_an_error_map_ends_where_it_says() -> None:
    colors = error_map(np.array([[0.0, DARKEST, 255.0]]))
    assert colors.shape == (1, 3, 3)
    assert colors[0, 0].sum() < 10
    assert (colors[0, 1] == colors[0, 2]).all()


def test_images_of_one_name_in_two_folders_are_kept_apart() -> None:
    assert [comparison_name(name) for name in ("a/001.png", "b/001.png", "c.jpg")] == ["a__001", "b__001", "c"]


def test_what_is_not_a_number_is_not_accepted() -> None:
    parent = Quality(0.4, 30.0, 0.96, 1.0)
    assert judge(Accept(psnr_drop=0.1), Quality(0.4, 29.95, 0.96, 1.0), parent) == []
    (refusal,) = judge(Accept(psnr_drop=0.1), Quality(0.4, math.nan, 0.96, math.nan), parent)
    assert refusal.startswith("psnr_drop is +nan")


def test_renditions_are_those_that_were_kept(finished: tuple[Chain, Notes]) -> None:
    records = Records(finished[0].runs)
    (crop,) = compared_crops(records, records.chains()[0])
    assert [rendition.stage for rendition in crop.renditions] == ["baseline", "phase4"]
    (path,) = (finished[0].folder / "phase4" / "reconstructions").iterdir()
    whole = np.asarray(Image.open(path))
    height, width = whole.shape[0], whole.shape[1] // 2
    places = [(top, left) for top in range(0, height - 255, 128) for left in range(0, width - 255, 128)]
    pieces = [(whole[y : y + 256, x : x + 256], whole[y : y + 256, width + x : width + x + 256]) for y, x in places]
    wanted = crop.original, crop.renditions[1].pixels
    assert any(np.array_equal(x, wanted[0]) and np.array_equal(x_hat, wanted[1]) for x, x_hat in pieces)


class Page(HTMLParser):
    """Collects headings, sources of images, and elements that were left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.sources.append(dict(attributes)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def test_the_page_holds_everything_and_needs_nothing(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    shutil.copytree(finished[0].runs, tmp_path / "runs")
    comparison.keep(cost_of(2.0), tmp_path / "runs", tmp_path / "kept")
    done = CliRunner().invoke(app, ["report", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.headings == [
        "Recipe mini", "Expected and measured", "Rate and distortion", "Stages", "Loss during a migration",
        "Training", "Reconstructions", "Lineage", "Cost", "mini on a machine",
    ]  # fmt: skip
    assert len(page.sources) == 3 + 1 + 2 * 2
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not re.search(r"<(script|link|iframe)|https?://|@import|url\(", text)
    for name in STAGES:
        digest = Records(tmp_path / "runs").chains()[0].published[name].digest
        assert digest is not None
        assert digest[:12] in text
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"mini-rate-distortion.png", "mini-training-0.013-seed-0.png", "cost-mini-cpu.png"}


def test_the_same_store_gives_the_same_page(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    pages = [write(finished[0].runs, tmp_path / name).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_nothing_to_report_on_is_told(finished: tuple[Chain, Notes], runs: Path) -> None:
    with pytest.raises(ReportError, match="no published stage of any recipe"):
        write(runs, runs / "report")
    with pytest.raises(ReportError, match="no published stage of base in its store; there are mini"):
        write(finished[0].runs, runs / "report", ["base"])
