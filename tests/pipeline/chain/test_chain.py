"""A whole chain: the files it leaves, how it resumes, and why stages run again."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import STAGES, Notes, Stop, mini_chain, run_chain, runs_of, steps_of
from PIL import Image

from pipeline.chain import chain as chain_module
from pipeline.chain.chain import Chain, ChainError
from pipeline.chain.measuring import segments_left
from pipeline.chain.stage import StageError
from pipeline.common.errors import Interrupted
from pipeline.data.images import Photos, find_images
from pipeline.data.pictures import DataError
from pipeline.evaluation import limits
from pipeline.recipes.schema import Segment
from pipeline.weights.checkpoints import CheckpointError, load_codec, publish, read, read_metadata
from pipeline.weights.published import Lineage, PublicationRecord


def test_every_stage_is_published_with_its_lineage(finished: tuple[Chain, Notes]) -> None:
    chain, _ = finished
    parent_digest = None
    for phase, task in enumerate(chain.tasks):
        checkpoint = read(task.checkpoint)
        assert load_codec(task.checkpoint).config == task.config
        assert checkpoint.metadata["name"] == STAGES[phase]
        assert checkpoint.metadata["inputs"].get("parent") == parent_digest
        parent_digest = checkpoint.metadata["digest"]
        record = json.loads(task.record.read_text())
        assert record["digest"] == parent_digest
        assert {path.name for path in task.folder.iterdir()} >= {
            "stage.yaml", "ledger.json", "evaluation.json", "rate-distortion.png", "reconstructions",
        }  # fmt: skip
    assert not (chain.folder / "states").exists()
    assert [planned.status for planned in chain.plan()] == ["done"] * 5


def test_mlflow_holds_the_chain_and_its_stages(finished: tuple[Chain, Notes]) -> None:
    chain, _ = finished
    client, (parent, *stages) = runs_of(chain)
    assert [run.data.tags["hpcm.stage"] for run in stages] == STAGES
    assert {run.data.tags["mlflow.parentRunId"] for run in stages} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *stages)} == {"FINISHED"}
    phase4 = stages[-1]
    assert phase4.data.params["schedule.frozen.handover"] == "4"
    assert {"train/align/loss", "train/frozen/bpp", "train/unfrozen/psnr_db", "val/psnr_db", "val/step0_gap"} <= (
        phase4.data.metrics.keys()
    )
    assert "train/frozen/psnr_db" not in phase4.data.metrics
    assert {entry.dataset.name for entry in phase4.inputs.dataset_inputs} == {"packaged-train", "packaged-val"}
    for key, steps in steps_of(client, phase4).items():
        assert steps == sorted(set(steps)), key
    artifacts = {artifact.path for artifact in client.list_artifacts(phase4.info.run_id)}
    assert artifacts == {
        "checkpoint.safetensors", "evaluation.json", "images", "images.json", "ledger.json",
        "rate-distortion.png", "reconstructions", "stage.yaml",
    }  # fmt: skip


def test_frozen_tensors_stay_and_new_ones_move(runs: Path) -> None:
    chain, moments = mini_chain(runs, "phase2"), {}

    class Moments(Notes):
        def segment(self, segment: Segment, done: int) -> None:
            state = sorted((chain.folder / "states" / "phase2").glob("*/segment-*"))
            if state:
                moments[segment.name] = read(state[-1])

    run_chain(chain, Moments())
    ledger = json.loads((chain.folder / "phase2" / "ledger.json").read_text())
    new = {entry["name"] for entry in ledger if entry["kind"] in ("renamed", "initialized")}

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name for name in after if not torch.equal(before[f"model/{name}"], after[name])}

    tensors = moments["unfrozen"].tensors
    at_unfreeze = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    fixed = {name for name in at_unfreeze if name.startswith("entropy_estimation")}
    assert moved(moments["frozen"].tensors, at_unfreeze) == new
    end = read(chain.tasks[-1].checkpoint).tensors
    assert moved(moments["unfrozen"].tensors, end) == end.keys() - fixed


def test_a_stage_cut_off_twice_ends_as_if_it_had_not_been(runs: Path, finished: tuple[Chain, Notes]) -> None:
    chain, reference = mini_chain(runs, "phase1"), finished[0]
    for stop in (Stop("frozen", 2, signal.SIGTERM), Stop("unfrozen", 3, signal.SIGINT)):
        with pytest.raises(Interrupted) as caught:
            run_chain(chain, stop)
        assert caught.value.exit_code == 128 + stop.signum
        assert runs_of(chain)[1][-1].info.status == "KILLED"
        assert f"cut off in {stop.at[0]} at step {stop.at[1]}" in chain.plan()[-1].reason
    notes = Notes()
    run_chain(chain, notes)
    assert "resumed in unfrozen at step 3" in notes.lines
    assert notes.steps == 2

    client, (_, _, phase1) = runs_of(chain)
    assert phase1.info.status == "FINISHED"
    attempts = [value for key, value in sorted(phase1.data.tags.items()) if key.startswith("hpcm.attempt.")]
    assert [attempt.partition(" UTC: ")[2] for attempt in attempts] == [
        "started; stopped by SIGTERM",
        "resumed in frozen at step 2; stopped by SIGINT",
        "resumed in unfrozen at step 3",
    ]
    expected = next(run for run in runs_of(reference)[1] if run.data.tags.get("hpcm.stage") == "phase1")
    assert steps_of(client, phase1) == steps_of(runs_of(reference)[0], expected)
    for key, value in expected.data.metrics.items():
        if not key.endswith("seconds"):
            assert phase1.data.metrics[key] == value, key
    assert chain.tasks[1].checkpoint.read_bytes() == reference.tasks[1].checkpoint.read_bytes()


def test_another_number_of_threads_is_told_when_a_stage_resumes(runs: Path) -> None:
    chain, threads = mini_chain(runs, "baseline"), torch.get_num_threads()
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 2, signal.SIGTERM))
    torch.set_num_threads(threads + 1)
    try:
        changed, same = Stop("scratch", 4, signal.SIGTERM), Notes()
        with pytest.raises(Interrupted):
            run_chain(chain, changed)
        run_chain(chain, same)
    finally:
        torch.set_num_threads(threads)
    told = f"threads: {threads} before, {threads + 1} now; the result will be as good as that of an uninterrupted run"
    assert [line for line in changed.lines if line.startswith(told)]
    assert not [line for line in same.lines if "uninterrupted" in line]


def test_what_is_done_is_left_alone(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    chain, notes = finished[0], Notes()
    before = [task.checkpoint.stat().st_mtime_ns for task in chain.tasks]
    run_chain(chain, notes)
    assert notes.lines == [f"{name}: done" for name in STAGES]
    assert [task.checkpoint.stat().st_mtime_ns for task in chain.tasks] == before


def test_changed_inputs_make_a_stage_stale_and_nothing_is_lost(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    shutil.copytree(finished[0].runs, tmp_path / "runs")
    original = mini_chain(tmp_path / "runs", "phase1").tasks[1].checkpoint.read_bytes()
    chain = mini_chain(tmp_path / "runs", "phase2", ["phase1.seed=7"])
    plan = chain.plan()
    assert [(planned.status, planned.reason) for planned in plan] == [
        ("done", "current"), ("stale", "stale: recipe changed (seed: 0 → 7)"), ("stale", "waits for phase1"),
    ]  # fmt: skip
    run_chain(chain)
    superseded = sorted((chain.folder / "superseded").iterdir())
    assert [path.name.split("-")[0] for path in superseded] == ["phase1", "phase2"]
    assert (superseded[0] / "checkpoint.safetensors").read_bytes() == original
    assert chain.tasks[1].checkpoint.read_bytes() != original
    assert [planned.status for planned in chain.plan()] == ["done"] * 3


def test_chains_of_other_seeds_lie_beside_the_first(finished: tuple[Chain, Notes]) -> None:
    close = mini_chain(finished[0].runs, "phase1", ["lmbda=0.0130000001"])
    assert close.folder.name == "lmbda-0.0130000001"
    chain = mini_chain(finished[0].runs, "phase1", ["seed=3"])
    assert chain.folder.name == "lmbda-0.013-seed-3"
    assert [planned.status for planned in chain.plan()] == ["missing", "missing"]
    # A change of a stage's own seed makes that stage stale, as any setting does.
    chain = mini_chain(finished[0].runs, "phase1", ["phase1.seed=3"])
    assert chain.folder == finished[0].folder
    assert [planned.status for planned in chain.plan()] == ["done", "stale"]


def test_settings_without_influence_keep_a_stage_current(finished: tuple[Chain, Notes]) -> None:
    chain = mini_chain(
        finished[0].runs, "phase4", ["log_every=7", "accept.psnr_drop=9.0", "gradient_checkpointing=true"]
    )
    assert {planned.status for planned in chain.plan()} == {"done"}


def test_a_baseline_is_taken_from_a_file(finished: tuple[Chain, Notes], runs: Path, tmp_path: Path) -> None:
    model = load_codec(finished[0].tasks[0].checkpoint)
    path = tmp_path / "own.safetensors"
    publish(path, model, Lineage())
    chain = mini_chain(runs, "baseline", baseline=path)
    run_chain(chain)
    assert read_metadata(chain.tasks[0].checkpoint)["digest"] == read_metadata(path)["digest"]
    assert [planned.status for planned in chain.plan()] == ["done"]
    with pytest.raises(
        StageError,
        match=r"own.safetensors: does not match the recipe's baseline.*'heads': 4.*expected .*'heads': 8",
    ):
        run_chain(
            mini_chain(tmp_path / "other", "baseline", ["model.overrides.attention.cross-attention.heads=8"], path)
        )
    with pytest.raises(CheckpointError, match=r"nowhere.safetensors: no such file"):
        mini_chain(runs, "baseline", baseline=tmp_path / "nowhere.safetensors").plan()
    with pytest.raises(ChainError, match="this is the chain's own baseline"):
        mini_chain(runs, "baseline", baseline=chain.tasks[0].checkpoint)
    with pytest.raises(ChainError, match=r"lmbda-0.013/baseline: this stage was made from a file; .* --baseline"):
        mini_chain(runs, "phase1").plan()
    assert chain.tasks[0].checkpoint.is_file()


def test_a_parent_of_other_images_is_judged_by_the_childs(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished[0].runs, runs)
    (tmp_path / "noise").mkdir()
    pixels = 255 * np.random.default_rng(0).integers(2, size=(128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise" / "noise.png")
    change = [f"phase1.data.val={tmp_path / 'noise'}", "phase1.schedule=[]", "phase1.accept.rd_loss_change=0.5"]
    chain = mini_chain(runs, "phase1", change)
    run_chain(chain, accept_anyway=False)  # On the parent's own images the loss is far lower.
    parent, child = (PublicationRecord.read(task.record).quality for task in chain.tasks)
    assert child.rd_loss > 1.6 * parent.rd_loss


def test_validation_images_that_change_or_are_too_large_are_noticed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Change(Notes):
        """Changes the image when the next stage begins."""

        def note(self, line: str) -> None:
            super().note(line)
            if line.startswith("phase1: "):
                Image.new("RGB", (128, 128), "white").save(tmp_path / "val" / "one.bmp")

    (tmp_path / "val").mkdir()
    Image.new("RGB", (128, 128), "black").save(tmp_path / "val" / "one.bmp")
    Image.new("RGB", (1, 257)).save(tmp_path / "val" / "a line.png")
    monkeypatch.setattr(limits, "coding_bytes", lambda config, pixels: 2**60 if pixels > 2 * 128**2 else 1)
    settings = [f"data.val={tmp_path / 'val'}", "baseline.schedule=[]", "evaluation.images=2"]
    chain, notes = mini_chain(runs, "phase1", settings), Change()
    with pytest.raises(DataError, match="val: the validation images changed during the run; run the same command"):
        run_chain(chain, notes)
    assert any(line.startswith("left out of validation: a line.png: 1×257 pixels") for line in notes.lines)
    assert [planned.status for planned in chain.plan()] == ["done", "missing"]


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
def test_mistakes_in_later_stages_are_told_before_anything_runs(runs: Path, setting: str, message: str) -> None:
    with pytest.raises(StageError) as raised:
        run_chain(mini_chain(runs, "phase4", [setting]))
    expected = ".*".join(re.escape(part) for part in message.split("*"))
    assert re.search(expected, str(raised.value))
    assert not (runs / "mini").exists()


def test_a_damaged_parent_ends_its_childs_run_and_says_what_to_do(
    finished: tuple[Chain, Notes], tmp_path: Path
) -> None:
    shutil.copytree(finished[0].runs, tmp_path / "runs")
    chain = mini_chain(tmp_path / "runs", "phase1")
    shutil.rmtree(chain.tasks[1].folder)
    content = bytearray(chain.tasks[0].checkpoint.read_bytes())
    content[-1] ^= 1
    chain.tasks[0].checkpoint.write_bytes(content)
    with pytest.raises(StageError, match=r"do not match their digest; .*(?s:.*)hpcm run baseline --force"):
        run_chain(chain)
    assert all(run.info.status != "RUNNING" for run in runs_of(chain)[1])


def test_images_are_looked_for_once_in_a_chain(finished: tuple[Chain, Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def find(*about: object, runs: Path) -> Photos:
        looked.append(about)
        return find_images(*about, runs=runs)

    monkeypatch.setattr(chain_module, "find_images", find)
    mini_chain(finished[0].runs, "phase4").plan()
    assert looked == [(None, "train", 128)]


def test_a_result_beyond_its_limits_stops_the_chain_and_is_kept(runs: Path) -> None:
    limits = ["phase1.accept.bpp_change=-0.9"]
    chain = mini_chain(runs, "phase1", limits)
    with pytest.raises(StageError, match=r"phase1: not accepted, .* bpp_change is .*, allowed -0.9000") as caught:
        run_chain(chain, accept_anyway=False)
    assert "--accept-anyway" in str(caught.value)
    assert runs_of(chain)[1][-1].info.status == "FAILED"
    assert not chain.tasks[1].checkpoint.exists()
    planned = chain.plan()[1]
    assert planned.status == "refused"
    assert re.fullmatch(r"refused: bpp_change is \S+, allowed -0.9000; --accept-anyway publishes it", planned.reason)
    assert not list(segments_left([planned]))
    relaxed = mini_chain(runs, "phase1", [*limits, "phase1.accept.bpp_change=0.9"])
    assert relaxed.plan()[1].reason == "cut off in evaluation at step 0"
    notes = Notes()
    run_chain(relaxed, notes)
    assert notes.steps == 0
    assert "resumed in evaluation at step 0" in notes.lines
    assert chain.tasks[1].checkpoint.exists()


def test_a_damaged_state_is_named_and_the_one_before_used(runs: Path) -> None:
    chain = mini_chain(runs, "baseline")
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 4, signal.SIGTERM))
    newest = sorted((chain.folder / "states" / "baseline").glob("*/segment-*"))[-1]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 255
    newest.write_bytes(content)
    notes = Notes()
    run_chain(chain, notes)
    assert any("do not match their digest" in line for line in notes.lines)
    assert "resumed in scratch at step 3" in notes.lines


def test_crops_that_do_not_fit_the_windows_are_refused(runs: Path) -> None:
    with pytest.raises(StageError, match=r"data.crop: 96 must be a multiple of 128"):
        run_chain(mini_chain(runs, "baseline", ["data.crop=96"]))
