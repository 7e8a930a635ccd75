"""The lineage in a checkpoint is read as it was written, or refused with an error that names it."""

from dataclasses import replace
from pathlib import Path

import pytest
from mini import mini_codec

from modules.bitstream.identity import model_identity
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, publish, write
from pipeline.weights.published import Lineage, Quality, Validation

QUALITY = Quality(0.5, 30.0, None, 1.25)


def test_a_lineage_reads_back_as_it_was_written(tmp_path: Path) -> None:
    lineage = Lineage(
        name="phase1", inputs={"parent": "abc"}, quality=QUALITY,
        validation=Validation("digest", ("a.png", "b/λ.png"), 0.013, "mse"),
    )  # fmt: skip
    model = mini_codec(0)
    publish(tmp_path / "one.safetensors", model, lineage)
    found = Lineage.read(tmp_path / "one.safetensors")
    assert found.identity == model_identity(model).hex()
    assert replace(found, identity=None) == lineage


def test_a_lineage_with_a_field_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    model, path = mini_codec(0), tmp_path / "one.safetensors"
    write(path, codec_tensors(model), {"config": model.config.to_dict(), "quality": {"bpp": "much"}})
    with pytest.raises(CheckpointError, match=r"one.safetensors: damaged: quality.bpp: "):
        Lineage.read(path)
