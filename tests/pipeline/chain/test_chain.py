"""A whole chain: the files it leaves, what it accepts, and mistakes that stop it before anything is trained."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from mini import (
    PHOTOS,
    STAGES,
    Finished,
    Moments,
    Notes,
    begun,
    copied,
    history,
    mini_chain,
    mini_codec,
    record_of,
    run_chain,
)
from PIL import Image

from pipeline.chain.context import RunContext
from pipeline.chain.measuring import segments_left
from pipeline.chain.plan import ChainError, judge
from pipeline.chain.precheck import check_stages
from pipeline.chain.stage_codec import StageError, codec_config
from pipeline.chain.validation_images import ValidationImages
from pipeline.common.processes import ProcessGroup
from pipeline.data.pictures import DataError
from pipeline.evaluation import limits
from pipeline.evaluation.coding import comparison_name
from pipeline.recipes.schema import Accept
from pipeline.weights.checkpoints import CheckpointError, load_codec, publish, read, read_metadata
from pipeline.weights.published import Lineage, Quality


def test_every_stage_is_published_with_its_record(finished: Finished) -> None:
    chain, _ = finished
    parent_digest = None
    for name, task in zip(STAGES, chain.tasks, strict=True):
        metadata, record = read_metadata(task.checkpoint), record_of(chain, name)
        assert load_codec(task.checkpoint).config == codec_config(task)
        assert metadata["name"] == record.name == name
        assert metadata["inputs"].get("parent") == parent_digest
        assert (record.status, record.digest, record.steps) == ("done", metadata["digest"], record.trained.steps)
        parent_digest = record.digest
        files = {path.relative_to(task.folder).as_posix(): path for path in task.folder.rglob("*") if path.is_file()}
        assert record.files == {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name != "record.json"
        }
        assert record.files.keys() >= {
            "checkpoint.safetensors", "evaluation.json", "ledger.json", "metrics.jsonl", "rate-distortion.png",
            f"reconstructions/{comparison_name('coffee.jpg')}.png", "stage.yaml",
        }  # fmt: skip
    assert not (chain.folder / "training").exists()
    assert [planned.status for planned in chain.plan()] == ["done"] * 5


def test_the_record_and_the_metrics_tell_of_the_training(finished: Finished) -> None:
    record, metrics = record_of(finished[0], "phase4"), history(finished[0].folder / "phase4")
    assert [segment.name for segment in record.segments] == ["align", "frozen", "unfrozen"]
    assert record.segments[-1].quality.rd_loss == metrics["val/rd_loss"][-1][1]
    assert metrics["val/rd_loss"][0] == (0, record.start.step0.rd_loss)
    assert {"train/align/loss", "train/frozen/bpp", "train/unfrozen/psnr_db", "val/step0_gap"} <= metrics.keys()
    assert "train/frozen/psnr_db" not in metrics
    assert metrics["final/bpp"] == [(13, record.quality.bpp)]
    for name, values in metrics.items():
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), name


def test_frozen_tensors_stay_and_new_ones_move(finished: Finished, runs: Path) -> None:
    copied(finished[0], runs, "phase1")
    chain = mini_chain(runs, "phase2")
    run_chain(chain, moments := Moments(chain))
    ledger = json.loads((chain.folder / "phase2" / "ledger.json").read_text())
    new = {entry["name"] for entry in ledger if entry["kind"] in ("renamed", "initialized")}
    end = read(chain.tasks[-1].checkpoint).tensors

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name for name in end if not torch.equal(before[name], after[name])}

    frozen, unfrozen = (moments.tensors[name] for name in ("frozen", "unfrozen"))
    assert moved(frozen, unfrozen) == new
    assert moved(unfrozen, end) == {name for name in end if not name.startswith("entropy_estimation")}


def test_finished_stages_are_left_alone(finished: Finished) -> None:
    chain = finished[0]
    before = {path: path.stat().st_mtime_ns for path in chain.folder.rglob("*") if path.name != "lock"}
    assert run_chain(chain).lines == [f"{name}: done" for name in STAGES]
    assert {path: path.stat().st_mtime_ns for path in chain.folder.rglob("*") if path.name != "lock"} == before


def test_a_baseline_is_taken_from_a_file(finished: Finished, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    publish(path, load_codec(finished[0].tasks[0].checkpoint), Lineage())
    chain = mini_chain(runs, "baseline", baseline=path)
    run_chain(chain)
    assert read_metadata(chain.tasks[0].checkpoint)["digest"] == read_metadata(path)["digest"]
    assert [planned.status for planned in chain.plan()] == ["done"]
    other = mini_chain(tmp_path / "other", "baseline", ["model.overrides.attention.cross-attention.heads=8"], path)
    message = r"own.safetensors: does not match the recipe's baseline.*'heads': 4.*expected .*'heads': 8"
    with pytest.raises(StageError, match=message):
        run_chain(other)
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors: no such file"):
        mini_chain(runs, "baseline", baseline=tmp_path / "nowhere.safetensors").plan()
    with pytest.raises(ChainError, match="this is the chain's own baseline"):
        mini_chain(runs, "baseline", baseline=chain.tasks[0].checkpoint)
    with pytest.raises(ChainError, match=r"lmbda-0.013/baseline: this stage was made from a file; .* --baseline"):
        mini_chain(runs, "phase1").plan()


def test_parent_and_child_are_compared_on_the_childs_images(finished: Finished, runs: Path) -> None:
    noise = runs.parent / "noise"
    noise.mkdir()
    pixels = 255 * np.random.default_rng(0).integers(2, size=(128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(noise / "noise.png")
    copied(finished[0], runs, "baseline")
    change = [f"phase1.data.val={noise}", "phase1.schedule=[]", "phase1.accept.rd_loss_change=0.5"]
    chain = mini_chain(runs, "phase1", change)
    run_chain(chain, accept_anyway=False)  # On the parent's own images the loss is far lower.
    parent, child = (record_of(chain, name).quality for name in ("baseline", "phase1"))
    assert child.rd_loss > 1.6 * parent.rd_loss


def test_a_codec_that_diverged_is_refused_with_the_reason(runs: Path) -> None:
    codec = mini_codec(0)
    list(codec.g_a.parameters())[-1].data.fill_(1e12)
    with ProcessGroup(Accelerator(cpu=True)) as processes:
        images = ValidationImages(mini_chain(runs, "baseline").tasks[0], RunContext(processes))
        with pytest.raises(StageError, match=r"not accepted: .*too large"):
            images.evaluate(codec)


def test_validation_images_that_change_or_are_too_large_are_noticed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Change(Notes):
        """Changes the image when the next stage begins."""

        def note(self, line: str) -> None:
            super().note(line)
            if line.startswith("phase1: "):
                Image.new("RGB", (128, 128), "white").save(tmp_path / "val" / "coffee.jpg")

    shutil.copytree(PHOTOS, tmp_path / "val")
    (tmp_path / "val" / "empty.png").touch()
    settings = [f"data.val={tmp_path / 'val'}", "baseline.schedule=[]", "evaluation.images=2"]
    Image.new("RGB", (1, 257)).save(tmp_path / "val" / "a line.png")
    monkeypatch.setattr(limits, "coding_bytes", lambda config, pixels: 2**60 if pixels > 2 * 128**2 else 1)
    chain, notes = mini_chain(runs, "phase1", settings), Change()
    with pytest.raises(DataError, match="val: the validation images changed during the run; run the same command"):
        run_chain(chain, notes)
    assert notes.lines.count(f"skipped {tmp_path / 'val' / 'empty.png'}: empty file") == 1
    assert any(line.startswith("left out of validation: a line.png: 1×257 pixels") for line in notes.lines)
    assert chain.plan()[0].status == "done"
    assert not chain.tasks[1].checkpoint.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "phase2.schedule.frozen.lr={neww: 1.0e-3}",
            "--set phase2.*: schedule[1].lr.neww: selects no trainable parameter; did you mean 'new'?",
        ),
        ("phase3.schedule.frozen.train=[nothing]", "--set phase3.*: schedule[1].train: 'nothing' matches no parameter"),
        (
            "phase1.transfer.rename={attn_s9: attn_s3}",
            "--set phase1.*: transfer.rename.attn_s9: matches no tensor of the parent; did you mean 'attn_s*'?",
        ),
        (
            "phase4.model.overrides.N=16",
            "phase4.yaml:3: model: * has shape [1, 16* in the child but [1, 8* in the parent",
        ),
        ("phase2.data.crop=100", "--set phase2.data.crop=100: data.crop: 100 must be a multiple of 128"),
    ],
)
def test_mistakes_in_later_stages_are_reported_before_anything_runs(runs: Path, setting: str, message: str) -> None:
    with pytest.raises(StageError) as raised:
        check_stages(mini_chain(runs, "phase4", [setting]).tasks)
    expected = ".*".join(re.escape(part) for part in message.split("*"))
    assert re.search(expected, str(raised.value))
    assert not (runs / "mini").exists()


def test_a_result_beyond_its_limits_stops_the_chain_and_is_kept(finished: Finished, runs: Path) -> None:
    copied(finished[0], runs, "baseline")
    limits = ["phase1.schedule.align.steps=0", "phase1.accept.bpp_change=-0.9"]
    chain = mini_chain(runs, "phase1", limits)
    with pytest.raises(StageError, match=r"phase1: not accepted, .* bpp_change is .*, allowed -0.9000") as caught:
        run_chain(chain, accept_anyway=False)
    assert "--accept-anyway" in str(caught.value)
    assert begun(chain, "phase1").status == "refused"
    assert not chain.tasks[1].checkpoint.exists()
    planned = chain.plan()[1]
    assert planned.status == "refused"
    assert re.fullmatch(r"refused: bpp_change is \S+, allowed -0.9000; --accept-anyway publishes it", planned.reason)
    assert not list(segments_left([planned]))
    relaxed = mini_chain(runs, "phase1", [*limits, "phase1.accept.bpp_change=0.9"])
    assert relaxed.plan()[1].reason == "interrupted in evaluation at step 0"
    notes = run_chain(relaxed)
    assert notes.steps == 0
    assert "resumed in evaluation at step 0" in notes.lines
    record = record_of(chain, "phase1")
    assert [attempt.state for attempt in record.attempts] == ["failed", "finished"]
    assert record.result.verdict == "accepted"


def test_what_is_not_a_number_is_not_accepted() -> None:
    parent = Quality(0.4, 30.0, 0.96, 1.0)
    assert judge(Accept(psnr_drop=0.1), Quality(0.4, 29.95, 0.96, 1.0), parent) == []
    (refusal,) = judge(Accept(psnr_drop=0.1), Quality(0.4, math.nan, 0.96, math.nan), parent)
    assert refusal.startswith("psnr_drop is +nan")
