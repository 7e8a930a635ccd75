"""The page that `hpcm report` writes."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from made import costs
from mini import STAGES, Finished, Hpcm
from PIL import Image

from pipeline.evaluation.coding import comparison_name, save_comparison
from pipeline.evidence.reconstructions import BRIGHTEST, compared_crops, error_map
from pipeline.evidence.report import ReportError, write
from pipeline.evidence.report_tables import story_table
from pipeline.records.chains import RecordsError, read_chain


def test_an_error_map_ends_where_it_says() -> None:
    colors = error_map(np.array([[0.0, BRIGHTEST, 255.0]]))
    assert colors.shape == (1, 3, 3)
    assert colors[0, 0].sum() < 10
    assert (colors[0, 1] == colors[0, 2]).all()


def test_pictures_of_images_with_similar_or_long_names_are_kept_apart(tmp_path: Path) -> None:
    names = ["a.png", "a.jpg", "a.jpg.png", "b/a.png", "b__a.png", f"{'c/' * 200}a.png", f"{'ä' * 120}.png", ".png"]
    names.append(f"{comparison_name('a.jpg')}.png")
    assert len({comparison_name(name) for name in names}) == len(names)
    assert comparison_name("a.png") == "a"
    for name in names:
        save_comparison(tmp_path / f"{comparison_name(name)}.png", torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_renditions_are_those_that_were_kept(finished: Finished) -> None:
    (crop,) = compared_crops(read_chain(finished[0].folder))
    assert [rendition.stage for rendition in crop.renditions] == ["baseline", "phase4"]
    (path,) = (finished[0].folder / "phase4" / "reconstructions").iterdir()
    original, reconstruction = np.split(np.asarray(Image.open(path)), 2, axis=1)
    assert np.array_equal(crop.original, original)
    assert np.array_equal(crop.renditions[1].pixels, reconstruction)


def test_the_first_table_says_what_each_stage_did(finished: Finished) -> None:
    chain = read_chain(finished[0].folder)
    table = story_table([chain])
    assert table.columns[6:] == ("step 0", "after align", "after frozen", "after unfrozen")
    assert [row[1:5] for row in table.rows[:2]] == [
        ("baseline", "–", "–", "6"),
        ("phase1", "baseline", "attn_s3", "13"),
    ]
    start, last = chain.published["phase1"].record.start, chain.published["phase1"].record.segments[-1]
    assert table.rows[1][6] == f"{start.step0_gap:+.4f}"
    assert table.rows[1][9] == f"{last.quality.rd_loss - start.parent.rd_loss:+.4f}"


def test_the_page_holds_everything_and_needs_nothing(finished: Finished, tmp_path: Path, hpcm: Hpcm) -> None:
    shutil.copytree(finished[0].runs, tmp_path / "runs")
    costs(2.0).write(tmp_path / "runs" / "comparisons" / "mini-1")
    hpcm("report", "--runs", tmp_path / "runs", "--output", tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert Counter(re.findall(r"<(\w+)", text)) - Counter({"meta": 99, "img": 99, "br": 99}) == Counter(
        re.findall(r"</(\w+)>", text)
    )
    sources = re.findall(r'src="([^"]*)"', text)
    assert re.findall(r"<h[23]>([^<]*)", text) == [
        "Recipe mini", "What each stage did", "Quality and cost", "Against the controls", "Reconstructions",
        "Training", "Lineage", "Cost", "mini on a machine",
    ]  # fmt: skip
    assert len(sources) == 3 + 1 + 2 * 2
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<(script|link|iframe)|https?://|@import|url\(", text)
    assert text.count("No control was built") == 1  # said once, not for every stage
    for name in STAGES:
        assert read_chain(finished[0].folder).published[name].record.digest[:12] in text
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"mini-rate-distortion.png", "mini-training-lmbda-0.013.png", "cost-mini-cpu.png"}


def test_the_same_folder_gives_the_same_page(finished: Finished, tmp_path: Path) -> None:
    pages = [write(finished[0].runs, tmp_path / name).read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]


def test_nothing_to_report_on_is_an_error(finished: Finished, runs: Path) -> None:
    with pytest.raises(RecordsError, match="nothing was run here yet"):
        write(runs, runs / "report")
    with pytest.raises(ReportError, match="no published stage of base; there are mini"):
        write(finished[0].runs, runs / "report", ["base"])
    with pytest.raises(ReportError, match="no published stage mini/wide; there are mini/baseline, mini/phase1"):
        write(finished[0].runs, runs / "report", reference="mini/wide")


def test_every_stage_is_compared_with_one_that_is_named(finished: Finished, tmp_path: Path) -> None:
    page = write(finished[0].runs, tmp_path, reference="mini/baseline").read_text()
    assert "Every stage against one" in page
    assert "1 λ in common with mini/baseline; a curve needs two or more" in page
