"""Our codecs compared with Pillow's, at the same file sizes and as curves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import Hpcm, mini_codec
from PIL import Image, features

from pipeline.common.errors import UserError
from pipeline.evaluation.pillow_codecs import CODECS, PillowFiles, codecs_named, nearest_quality
from pipeline.evidence.codec_comparison import CodecComparison, OperatingPoint, deltas_table, draw
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage, Quality

THERE = {name: codec for name, codec in CODECS.items() if not codec.feature or features.check(codec.feature)}


@pytest.mark.parametrize(("size", "quality"), [(0, 0), (1037, 3), (1041, 4), (1500, 50), (9999, 100)])
def test_the_quality_with_the_nearest_size_is_found(size: int, quality: int) -> None:
    asked: list[int] = []

    def size_of(quality: int) -> int:
        asked.append(quality)
        return 1000 + 10 * quality + (5 if quality == 4 else 0)

    assert nearest_quality(size_of, size) == quality
    assert len(set(asked)) <= 9


def test_codecs_and_missing_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [codec.title for codec in codecs_named(["jpeg"])] == ["JPEG"]
    with pytest.raises(UserError, match="there is no codec 'jpg'; expected some of jpeg,webp,avif"):
        codecs_named(["jpg", "webp"])
    monkeypatch.setattr(features, "check", lambda feature: feature != "avif")
    with pytest.raises(UserError, match=r"does not support AVIF\. Upgrade it .*, or leave avif out of --against"):
        codecs_named(["webp", "avif"])


def test_a_file_has_the_quality_that_pillow_gives_it() -> None:
    gray = torch.full((1, 3, 16, 24), 128 / 255)
    for codec in THERE.values():
        files = PillowFiles(codec, ("gray", gray))
        quality = files.measure(90)
        assert quality.bpp == 8 * len(files.file(90)) / (16 * 24)
        assert quality.psnr_db > 40


def test_codecs_are_compared_at_equal_sizes_and_drawn(tmp_path: Path, hpcm: Hpcm) -> None:
    publish(tmp_path / "checkpoint.safetensors", mini_codec(0), Lineage(name="mini"))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    (tmp_path / "vtm.csv").write_text("bpp,psnr\n0.2,30\n0.4,33\n")
    plot, output = tmp_path / "curves.png", tmp_path / "values.json"
    against = ",".join([*THERE, str(tmp_path / "vtm.csv"), "hpcm-large-kodak"])
    command = ["evaluate", tmp_path / "noise.png", "-c", tmp_path, "--against", against]
    shown = hpcm(*command, "--plot", plot, "-o", output)
    assert "hpcm-large-kodak: measured on the 24 Kodak images, and these are others" in shown.err
    assert "BD-rate of our codecs" in shown.out
    assert "--against ,: expected some of jpeg, " in hpcm(*command[:-1], ",", code=1).err
    values = json.loads(output.read_text())
    assert set(values["published"]) == {"vtm", "hpcm-large-kodak"}
    (point,) = values["points"]
    assert [point["name"], *(other["codec"] for other in point["others"])] == [
        "mini", *(codec.title for codec in THERE.values()),
    ]  # fmt: skip
    size = round(point["ours"]["bpp"] * 48 * 64 / 8)
    named = "noise.png", torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for codec, other in zip(THERE.values(), point["others"], strict=True):
        sizes = [len(codec.encode(Image.fromarray(pixels), quality)) for quality in (0, 100)]
        chosen = PillowFiles(codec, named).nearest(size)
        assert other["quality"]["bpp"] == PillowFiles(codec, named).measure(chosen).bpp
        assert chosen == 0 or sizes[0] < size
        assert f"{other['quality']['psnr_db']:.2f}" in shown.out
    assert Image.open(plot).format == "PNG"
    assert {title for title, curve in values["curves"].items() if curve} <= {codec.title for codec in THERE.values()}
    hpcm("evaluate", tmp_path, "--plot", plot, code=2)


def test_curves_and_points_are_drawn_and_compared_for_both_metrics() -> None:
    low, high = Quality(0.2, 30.0, 0.9, 0.2), Quality(0.4, 33.0, 0.99, 0.4)
    points = tuple(OperatingPoint(str(n), quality, ()) for n, quality in enumerate((low, high)))
    published = tuple(Quality(q.bpp / 1.1, q.psnr_db, None, 0.0) for q in (low, high))
    comparison = CodecComparison(2, points, {"JPEG": (low,)}, {"by others": published})
    psnr, similarity = draw(comparison).axes
    assert [line.get_label() for line in psnr.lines] == ["JPEG", "by others", "HPCM, this project"]
    assert list(psnr.lines[2].get_ydata()) == [30, 33]
    assert list(similarity.lines[1].get_ydata()) == pytest.approx([10, 20])
    assert deltas_table(comparison).rows == [("JPEG", "1", "–", "–"), ("by others", "2", "+10.00", "–")]
