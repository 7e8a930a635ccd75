"""`hpcm audit` on chains that were really run: what it reads and which problems it finds."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from mini import STAGES, Notes, Stop, mini_chain, run_chain
from pipeline.tracking.records import Records
from typer.testing import CliRunner

from pipeline.chain.chain import Chain
from pipeline.commands.main import app
from pipeline.common.errors import Interrupted
from pipeline.evidence.audit import ChainAudit, audit
from pipeline.evidence.audit_display import segment_text, tables, to_json
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.published import Lineage


@pytest.fixture
def baseline(runs: Path) -> Chain:
    """A Baseline of its own, to be damaged."""
    chain = mini_chain(runs, "baseline")
    run_chain(chain)
    return chain


def problems(runs: Path) -> str:
    """All that the audit found, in one text."""
    return "\n".join(problem for chain in audit(runs) for stage in chain.stages for problem in stage.problems)


@pytest.fixture(scope="module")
def audited(finished: tuple[Chain, Notes]) -> ChainAudit:
    """The audit of the chain that ran to Phase 4."""
    (chain,) = audit(finished[0].runs)
    return chain


def test_a_whole_chain_is_verified(audited: ChainAudit) -> None:
    assert [stage.record.name for stage in audited.stages] == STAGES
    assert all(stage.sound and stage.files == "verified" for stage in audited.stages)
    phase1 = audited.stages[1].record
    assert [(s.name, s.objective, s.steps, s.handover, s.rates) for s in phase1.segments] == [
        ("align", "align", 2, 0, {"new": "0.001"}),
        ("frozen", "rate-distortion", 6, 4, {"new": "0.001"}),
        ("unfrozen", "rate-distortion", 5, 0, {"default": "0.001", "rwkv": "0.001"}),
    ]
    assert all(segment.loss is not None for segment in phase1.segments)


def test_times_agree_with_the_stages_own_record(audited: ChainAudit, finished: tuple[Chain, Notes]) -> None:
    for stage, task in zip(audited.stages, finished[0].tasks, strict=True):
        assert stage.record.seconds == pytest.approx(json.loads(task.record.read_text())["training_seconds"])


def test_tables_fit_the_page_and_say_everything(audited: ChainAudit) -> None:
    from rich.console import Console

    console = Console(width=100, record=True)
    results, story = tables(audited)
    console.print(results.rich(), width=80)
    console.print(story.rich())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "\n baseline " in text
    for phrase in ("227 copied", "25 initialized", "handover 4; new 0.001", "accepted", "verified"):
        assert phrase in text
    for stage in audited.stages:
        assert f"{stage.record.quality.rd_loss:.4f}" in text
    assert "| phase1 | baseline |" in results.markdown()
    assert "227 copied<br>6 dropped" in story.markdown()


def test_rates_by_name_pattern_are_shown(runs: Path) -> None:
    run_chain(mini_chain(runs, "baseline", ['baseline.schedule.scratch.lr={"g_*": 1.0e-3, default: 1.0e-4}']))
    (phase,) = audit(runs)[0].stages[0].record.segments
    assert "g_*" in segment_text(phase)
    assert "0.0001" in segment_text(phase)


def test_a_changed_byte_is_noticed_and_the_exit_code_says_so(baseline: Chain) -> None:
    path = baseline.tasks[0].checkpoint
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    done = CliRunner().invoke(app, ["audit", "--runs", str(baseline.runs), "--json"])
    assert done.exit_code == 1
    (stage,) = json.loads(done.stdout)[0]["stages"]
    assert "do not match their digest" in stage["problems"][0]
    assert stage["files"] == "not as recorded"


def test_another_checkpoint_in_its_place_is_noticed(baseline: Chain) -> None:
    path = baseline.tasks[0].checkpoint
    model = load_codec(path)
    model.means_hyper.data += 1
    publish(path, model, Lineage(name="baseline"))
    assert "not the checkpoint that was recorded" in problems(baseline.runs)


def test_a_published_stage_without_its_run_is_noticed(baseline: Chain, empty_store: Path) -> None:
    shutil.copy(empty_store / "mlflow.db", baseline.runs)  # as if it had been deleted, and made again by the next run
    run_chain(mini_chain(baseline.runs, "baseline"))
    done = CliRunner().invoke(app, ["audit", "--runs", str(baseline.runs)])
    assert done.exit_code == 1
    assert f"{baseline.tasks[0].record}: MLflow has no run of this stage" in done.output


def test_lost_files_are_noticed(baseline: Chain) -> None:
    baseline.tasks[0].record.unlink()
    records = Records(baseline.runs)
    records.artifact(records.chains()[0].stages[0].run_id, "checkpoint.safetensors").unlink()
    found = problems(baseline.runs)
    assert "record.json: no such file" in found
    assert "MLflow's copy" in found
    baseline.tasks[0].checkpoint.unlink()
    assert "checkpoint.safetensors: no such file" in problems(baseline.runs)


def test_an_altered_record_is_noticed(baseline: Chain) -> None:
    with sqlite3.connect(baseline.runs / "mlflow.db") as store:
        store.execute("UPDATE latest_metrics SET value = value + 1 WHERE key = 'final/psnr_db'")
        store.execute("UPDATE tags SET value = 'other' WHERE key = 'hpcm.input.recipe'")
    found = problems(baseline.runs)
    assert "its quality differs from the recorded one" in found
    assert "its recipe differs from the recorded one" in found


def test_what_was_superseded_is_verified_where_it_lies(baseline: Chain) -> None:
    run_chain(mini_chain(baseline.runs, "baseline", ["optimizer.clip_norm=0.5"]))
    (audited,) = audit(baseline.runs)
    assert [stage.files for stage in audited.stages] == ["superseded", "verified"]
    assert audited.record.published["baseline"] is audited.stages[1].record
    shutil.rmtree(baseline.folder / "superseded")
    assert "not the checkpoint that was recorded" in problems(baseline.runs)


def test_interruptions_are_told(runs: Path) -> None:
    chain = mini_chain(runs, "baseline")
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 4, 15))
    (stage,) = audit(runs)[0].stages
    assert (stage.sound, stage.files, stage.record.state) == (True, "not published", "KILLED")
    run_chain(chain)
    (audited,) = audit(runs)
    assert audited.stages[0].record.attempts == ["started; stopped by SIGTERM", "resumed in scratch at step 4"]
    assert to_json([audited])[0]["stages"][0]["attempts"] == audited.stages[0].record.attempts
    assert "resumed in scratch at step 4" in list(tables(audited))[1].markdown()


def test_a_root_taken_from_a_file_was_not_trained(finished: tuple[Chain, Notes], runs: Path) -> None:
    run_chain(mini_chain(runs, "baseline", baseline=finished[0].tasks[0].checkpoint))
    (audited,) = audit(runs)
    assert audited.stages[0].sound
    assert audited.record.total_steps("baseline") == 0
    assert "taken from a file" in list(tables(audited))[1].markdown()


def test_one_form_at_a_time(runs: Path) -> None:
    done = CliRunner().invoke(app, ["audit", "--runs", str(runs), "--json", "--markdown"])
    assert done.exit_code == 2
    assert "not both" in done.output


def test_nothing_yet(runs: Path) -> None:
    done = CliRunner().invoke(app, ["audit", "--runs", str(runs)])
    assert done.exit_code == 0
    assert "no chains yet" in done.stdout


def test_a_moved_folder_is_audited_where_it_lies(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    copied = tmp_path / "a?b#c%25" / "runs"
    shutil.copytree(finished[0].runs, copied)
    assert problems(copied) == ""
    chain = mini_chain(copied, "phase4")
    assert {planned.status for planned in chain.plan()} == {"done"}
    content = bytearray(chain.tasks[1].checkpoint.read_bytes())
    content[-1] ^= 255
    chain.tasks[1].checkpoint.write_bytes(content)
    assert "do not match their digest" in problems(copied)
    assert problems(finished[0].runs) == ""
