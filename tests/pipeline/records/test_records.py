"""The record of a stage, its metrics, and reading of chains."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.common.files import FileError, write_json
from pipeline.evaluation.results import Evaluation, ImageResult
from pipeline.records import metrics
from pipeline.records.chains import CHAIN_FILE, RecordsError, read_chains
from pipeline.records.metrics import MetricsLog, read_history, read_reports
from pipeline.records.record import FILE, DataSet, Result, Source, StageRecord
from pipeline.records.source import source_of
from pipeline.records.stage_log import StageLog
from pipeline.weights.published import Lineage, Quality

SOURCE = Source("hpcm run", "user", "", False, "cpu", {"torch": "2"})
IMAGES = DataSet("photos", "/photos", "0" * 64, 2, 1000)
QUALITY = Quality(0.25, 30.0, None, 1.5, {"mine": 2.0})


def record(name: str, parent: str | None, steps: int = 4, codec: str = "rwkv") -> StageRecord:
    """A record of a stage that has just begun."""
    settings = f"data: {{batch_size: 2, crop: 128}}\nschedule: [{{name: all, steps: {steps}}}]\n"
    lineage = Lineage(name=name, stage=settings, inputs={"recipe": "1"})
    return StageRecord(
        f"key of {name}", "mini", 0.013, 0, name, parent, "training", lineage, {"attn_s3": codec}, None, IMAGES, IMAGES
    )


def test_a_record_reads_back_as_written(tmp_path: Path) -> None:
    log = StageLog.begin(tmp_path, record("phase1", "baseline"), "started", SOURCE)
    image = ImageResult("a.png", QUALITY, 0.24, 0.1, 0.2)
    log.update(result=Result(Evaluation((image,)), QUALITY, "accepted", (), 10, 1.5))
    log.end("finished", status="done", digest="abc")
    read = StageRecord.read(tmp_path)
    assert read == log.record
    assert (read.quality, read.steps, read.status) == (QUALITY, 4, "done")
    assert read.ended is not None


def test_an_attempt_continues_the_record_and_its_key(tmp_path: Path) -> None:
    StageLog.begin(tmp_path, record("phase1", "baseline"), "started", SOURCE).end("interrupted", "SIGTERM")
    again = replace(record("phase1", "baseline"), key="another")
    log = StageLog.begin(tmp_path, again, "resumed in all at step 2", SOURCE)
    assert log.record.key == "key of phase1"
    assert [attempt.reason for attempt in log.record.attempts] == ["SIGTERM", ""]


def test_names_that_are_not_utf8_are_recorded_readably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"b\xff")
    monkeypatch.setattr("sys.argv", ["/opt/bin/hpcm", "run", "phase4", "--data", name])
    source = source_of(torch.device("cpu"), {})
    StageLog.begin(tmp_path, record("phase1", "baseline"), "started", source).end("failed", f"{name}: no such file")
    (attempt,) = StageRecord.read(tmp_path).attempts
    assert attempt.source.command == "hpcm run phase4 --data b\\xff"
    assert attempt.reason == "b\\xff: no such file"


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = StageLog.begin(None, record("phase1", None), "started", SOURCE)
    log.metrics.append({"loss": 1.0}, 1)
    log.metrics.cut(0)
    log.end("finished")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"lmbda": "high"}, "lmbda"),
        ({"status": "lost"}, "status"),
        ({"lmbda": 0.05}, "changed after it was written"),
    ],
)
def test_a_damaged_record_is_an_error_that_names_file_and_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    record("phase1", None).write(tmp_path)
    write_json(tmp_path / FILE, {**json.loads((tmp_path / FILE).read_text()), **change})
    with pytest.raises(FileError, match=f"{FILE}.*{message}"):
        StageRecord.read(tmp_path)


def test_metrics_are_cut_to_the_lines_of_a_state(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / metrics.FILE)
    for step in (2, 4, 4):
        log.append({"loss": step / 2, "val": math.inf}, step)
    log.cut(2)
    log.append({"loss": 9.0}, 6)
    assert read_history(tmp_path) == {"loss": [(2, 1.0), (4, 2.0), (6, 9.0)], "val": [(2, math.inf), (4, math.inf)]}
    assert MetricsLog(tmp_path / metrics.FILE).lines == 3
    assert [report.step for report in read_reports(tmp_path / metrics.FILE, 1, 2)] == [4]


def test_an_unfinished_line_is_cut_and_other_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    log = MetricsLog(path)
    log.append({"loss": 1.0}, 1)
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ti')  # killed while writing
    log = MetricsLog(path)
    assert log.lines == 1
    log.cut(log.lines)
    log.append({"loss": 2.0}, 2)
    assert read_history(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}
    path.write_bytes(b'{"step": 2.5}\n')
    with pytest.raises(FileError, match=r"metrics\.jsonl:1.*step"):
        read_history(tmp_path)


def test_chains_are_read_from_folders(tmp_path: Path) -> None:
    chain = tmp_path / "mini" / "lmbda-0.013"
    with pytest.raises(RecordsError, match="--runs"):
        read_chains(tmp_path)
    write_json(chain / CHAIN_FILE, {"key": "k", "recipe": "mini", "lmbda": 0.013, "seed": 0})
    places = {
        "phase1": record("phase1", "baseline", 3),
        "baseline": record("baseline", None, 5, "cross-attention"),
        "control": record("control", "baseline", 3, "cross-attention"),
        "training/phase2/0123": record("phase2", "phase1"),
        "superseded/phase1-abc": record("phase1", "baseline"),
        "abandoned/phase2/0123": record("phase2", "phase1"),
    }
    for place, stage in places.items():
        (chain / place).mkdir(parents=True)
        stage.write(chain / place)
    (read,) = read_chains(tmp_path)
    assert sorted(stage.place for stage in read.stages) == sorted(
        ["published"] * 3 + ["training", "superseded", "abandoned"]
    )
    assert list(read.published) == ["baseline", "control", "phase1"]
    assert read.total_steps("phase1") == 8
    assert read.control("phase1") == "control"
    assert read.control("control") is None
