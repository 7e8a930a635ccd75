"""The records of a published stage are read as they were written, or refused with an error that names them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mini import mini_codec

from modules.bitstream.identity import model_identity
from pipeline.common.files import FileError
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, write
from pipeline.weights.published import Lineage, PublicationRecord, Quality, StartFacts, Validation, publish

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


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    facts = StartFacts(QUALITY, Quality(float("inf"), float("nan"), 0.9, 2.0), 0.75)
    record = PublicationRecord("d", {"recipe": "r"}, "key", 10, 1.5, QUALITY, 3.0, 6, 0, facts)
    record.write(tmp_path / "record.json")
    assert repr(PublicationRecord.read(tmp_path / "record.json")) == repr(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": 5}, "digest: Input should be a valid string"),
        ({"steps": "6"}, "steps: Input should be a valid integer"),
        ({"inputs": {"recipe": None}}, "inputs.recipe: Input should be a valid string"),
        ({"quality": {}}, "quality.bpp: Field required"),
    ],
)
def test_a_damaged_record_is_refused_by_name(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    PublicationRecord("d", {}, None, 10, 1.5, QUALITY, 3.0, 6, 0, StartFacts()).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FileError, match=f"record.json: damaged: {message}"):
        PublicationRecord.read(path)
