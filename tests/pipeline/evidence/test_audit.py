"""`hpcm audit` on folders of a chain that was really run: what it shows and which problems it finds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mini import STAGES, Finished, Hpcm

from pipeline.evidence.audit import ChainAudit, audit, tables, to_json
from pipeline.records.record import FILE, StageRecord
from pipeline.weights.checkpoints import load_codec, publish


def problems(runs: Path) -> str:
    """All that the audit found, in one text."""
    chains, others = audit(runs)
    return "\n".join([*others, *(problem for chain in chains for stage in chain.stages for problem in stage.problems)])


@pytest.fixture
def chain(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the chain up to Phase 1, to be damaged, below a folder with special characters in its name."""
    folder = tmp_path / "a?b#c%25[1]" / "mini" / finished[0].folder.name
    for name in STAGES[:2]:
        shutil.copytree(finished[0].folder / name, folder / name)
    shutil.copy(finished[0].folder / "chain.json", folder)
    return folder


@pytest.fixture(scope="module")
def audited(finished: Finished) -> ChainAudit:
    """The audit of the chain that ran to Phase 4."""
    (chain,), others = audit(finished[0].runs)
    assert others == []
    return chain


def test_a_whole_chain_is_verified_and_shown(audited: ChainAudit) -> None:
    assert [stage.stage.record.name for stage in audited.stages] == STAGES
    assert [stage.files for stage in audited.stages] == ["verified"] * 5
    results, story = tables(audited)
    assert results.rows[1][:2] == ("phase1", "baseline")
    for phrase in ("227 copied / 6 dropped", "25 initialized", "handover 4; new 0.001", "rwkv 0.001", "accepted"):
        assert phrase in story.plain()
    for stage in audited.stages:
        assert f"{stage.stage.record.evaluated.quality.rd_loss:.4f}" in results.plain()
    shown = to_json([audited])[0]["stages"][1]
    assert (shown["parent"], shown["start"]["tensors"]["copied"], shown["verified"]) == ("baseline", 227, "verified")


def test_damage_of_any_published_file_is_found(chain: Path) -> None:
    assert problems(chain.parents[1]) == ""
    files = sorted(path for path in (chain / "phase1").rglob("*") if path.is_file())
    assert {"checkpoint.safetensors", "evaluation.json", "ledger.json", "metrics.jsonl", "stage.yaml", FILE} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        assert str(path) in problems(chain.parents[1])
        path.unlink()
        assert f"{path}: no such file" in problems(chain.parents[1])
        path.write_bytes(content)
    assert problems(chain.parents[1]) == ""


def test_the_exit_code_says_that_a_file_is_damaged(chain: Path, hpcm: Hpcm) -> None:
    (chain / "baseline" / "evaluation.json").write_text("{}")
    stages = json.loads(hpcm("audit", "--runs", chain.parents[1], "--json", code=1).out)[0]["stages"]
    assert [stage["verified"] for stage in stages] == ["not as recorded", "verified"]
    assert "evaluation.json: changed after it was published" in stages[0]["problems"][0]


def test_another_checkpoint_or_lineage_is_noticed(chain: Path) -> None:
    folder = chain / "baseline"
    record = StageRecord.read(folder)
    replace(record, lineage=replace(record.lineage, inputs={"recipe": "another"})).write(folder)
    assert "its lineage or configuration differs from the recorded one" in problems(chain.parents[1])
    record.write(folder)
    model = load_codec(folder / "checkpoint.safetensors")
    model.means_hyper.data += 1
    publish(folder / "checkpoint.safetensors", model, record.lineage)
    assert "not the checkpoint that was recorded" in problems(chain.parents[1])


def test_a_lost_parent_or_description_of_the_chain_is_noticed(chain: Path) -> None:
    shutil.rmtree(chain / "baseline")
    assert "is not a baseline of this chain" in problems(chain.parents[1])
    (chain / "chain.json").unlink()
    assert "chain.json: no such file" in problems(chain.parents[1])


def test_superseded_stages_are_verified_where_they_lie(chain: Path) -> None:
    aside = chain / "superseded" / "baseline-0123"
    shutil.copytree(chain / "baseline", aside)
    (audited,), _ = audit(chain.parents[1])
    assert sorted(stage.files for stage in audited.stages) == ["superseded", "verified", "verified"]
    (aside / "ledger.json").unlink()
    assert str(aside / "ledger.json") in problems(chain.parents[1])


@pytest.mark.parametrize(
    ("change", "files", "phrase"),
    [
        (lambda r: replace(r, status="training", result=None), "interrupted", "resumed in frozen at step 4; SIGTERM"),
        (
            lambda r: replace(
                r, status="refused", result=replace(r.evaluated, verdict="refused", reasons=("psnr_drop is +9",))
            ),
            "refused",
            "refused: psnr_drop is +9",
        ),
    ],
)
def test_unfinished_trainings_are_shown(
    chain: Path, change: Callable[[StageRecord], StageRecord], files: str, phrase: str
) -> None:
    record = StageRecord.read(chain / "phase1")
    last = replace(record.attempts[0], how="resumed in frozen at step 4", state="interrupted", reason="SIGTERM")
    folder = chain / "training" / "phase1" / "0123"
    (chain / "training" / "phase1").mkdir(parents=True)
    (chain / "phase1").rename(folder)
    change(replace(record, attempts=(*record.attempts, last))).write(folder)
    (audited,), others = audit(chain.parents[1])
    assert (others, audited.stages[1].files, audited.stages[1].problems) == ([], files, ())
    assert phrase in list(tables(audited))[1].plain()


def test_a_root_taken_from_a_file_was_not_trained(chain: Path) -> None:
    record = StageRecord.read(chain / "baseline")
    replace(record, lineage=replace(record.lineage, inputs={"baseline": "1"})).write(chain / "baseline")
    (audited,), _ = audit(chain.parents[1])
    assert audited.record.total_steps("baseline") == 0
    assert "taken from a file" in list(tables(audited))[1].plain()


def test_an_empty_folder_has_no_chains(runs: Path, hpcm: Hpcm) -> None:
    assert "no chains yet" in hpcm("audit", "--runs", runs).out


def test_mlflow_is_compared_on_request(chain: Path, empty_store: Path, hpcm: Hpcm) -> None:
    runs = chain.parents[1]
    audited = json.loads(hpcm("audit", "--mlflow", "--runs", runs, "--json", code=1).out)
    assert "`hpcm sync` makes it" in audited[0]["stages"][0]["problems"][0]
    assert not (runs / "mlflow.db").exists()
    shutil.copy(empty_store / "mlflow.db", runs)
    hpcm("sync", "--runs", runs)
    hpcm("audit", "--mlflow", "--runs", runs)
