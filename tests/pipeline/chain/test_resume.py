"""An interrupted stage continues where it stopped, and ends as if it had not been interrupted."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from mini import Finished, Notes, begun, copied, history, interrupt, mini_chain, record_of, run_chain
from typer.testing import CliRunner

from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError
from pipeline.commands.main import app
from pipeline.common.files import FileError


@pytest.fixture
def interrupted(runs: Path) -> Chain:
    """A chain whose Baseline was interrupted at step 5, with a last state at step 5 and the one before at step 3."""
    chain = mini_chain(runs, "baseline")
    interrupt(chain, "scratch", 5)
    return chain


def test_a_stage_interrupted_twice_ends_as_if_it_had_not_been(finished: Finished, runs: Path) -> None:
    copied(finished[0], runs, "baseline")
    chain, reference = mini_chain(runs, "phase1"), finished[0]
    for segment, step, signum in (("frozen", 2, signal.SIGTERM), ("unfrozen", 3, signal.SIGINT)):
        assert interrupt(chain, segment, step, signum) == 128 + signum
        assert begun(chain, "phase1").attempts[-1].state == "interrupted"
        assert f"interrupted in {segment} at step {step}" in chain.plan()[-1].reason
    notes = run_chain(chain)
    assert "resumed in unfrozen at step 3" in notes.lines
    assert notes.steps == 2
    record, expected = record_of(chain, "phase1"), record_of(reference, "phase1")
    assert [(attempt.how, attempt.reason) for attempt in record.attempts] == [
        ("started", "stopped by SIGTERM"),
        ("resumed in frozen at step 2", "stopped by SIGINT"),
        ("resumed in unfrozen at step 3", ""),
    ]
    assert [part.quality for part in record.segments] == [part.quality for part in expected.segments]
    assert history(chain.folder / "phase1") == history(reference.folder / "phase1")
    assert chain.tasks[1].checkpoint.read_bytes() == reference.tasks[1].checkpoint.read_bytes()


def test_another_number_of_threads_is_noted_when_a_stage_resumes(interrupted: Chain) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        notes = run_chain(interrupted)
    finally:
        torch.set_num_threads(threads)
    change = f"threads: {threads} before, {threads + 1} now; the result will be as good as that of an uninterrupted run"
    assert [line for line in notes.lines if "uninterrupted" in line] == [f"{change}, but not bit for bit the same"]


def test_a_damaged_state_is_named_and_the_one_before_used(interrupted: Chain) -> None:
    newest = sorted(interrupted.tasks[0].trainings.glob("*/segment-*"))[-1]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 255
    newest.write_bytes(content)
    notes = run_chain(interrupted)
    assert any("do not match their digest" in line for line in notes.lines)
    assert "resumed in scratch at step 3" in notes.lines
    assert [step for step, _ in history(interrupted.tasks[0].folder)["train/scratch/loss"]] == [2, 4, 6]


def test_a_damaged_record_of_a_training_is_named(interrupted: Chain) -> None:
    (record,) = interrupted.tasks[0].trainings.glob("*/record.json")
    record.write_text("{}")
    with pytest.raises(ChainError, match=rf"{record}: damaged: (?s:.*)`hpcm clean`"):
        interrupted.plan()


def test_a_folder_that_is_moved_during_a_run_ends_it_and_resumes_elsewhere(runs: Path, tmp_path: Path) -> None:
    class Move(Notes):
        def step(self, values: dict[str, float] | None) -> None:
            super().step(values)
            if self.steps == 5:
                runs.rename(tmp_path / "moved")

    with pytest.raises(FileError, match=rf"{runs}\S*: No such file or directory. If it was moved"):
        run_chain(mini_chain(runs, "baseline"), Move())
    chain = mini_chain(tmp_path / "moved", "baseline")
    assert chain.plan()[0].reason == "interrupted in scratch at step 3"
    assert run_chain(chain).steps == 3
    assert [step for step, _ in history(chain.tasks[0].folder)["train/scratch/loss"]] == [2, 4, 6]
    assert not runs.exists()


def test_a_run_writes_nothing_into_a_folder_that_replaced_its_own(runs: Path, tmp_path: Path) -> None:
    """As when a second run begins after the first one's folder was deleted."""
    others: list[Path] = []

    class Replace(Notes):
        def step(self, values: dict[str, float] | None) -> None:
            super().step(values)
            if self.steps == 4:
                shutil.copytree(runs, tmp_path / "copy")
                shutil.rmtree(runs)
                (tmp_path / "copy").rename(runs)
                others.extend(sorted(path for path in runs.rglob("*") if path.is_file()))

    with pytest.raises(FileError, match="another folder was put in its place"):
        run_chain(mini_chain(runs, "baseline"), Replace())
    assert sorted(path for path in runs.rglob("*") if path.is_file()) == others


def test_a_training_with_other_inputs_is_kept(interrupted: Chain) -> None:
    other = mini_chain(interrupted.runs, "baseline", ["optimizer.clip_norm=0.5"])
    kept = "not built yet; an interrupted training with other inputs is kept: recipe changed "
    assert other.plan()[0].reason == kept + "(optimizer.clip_norm: 1.0 → 0.5)"
    run_chain(other)
    assert interrupted.plan()[0].reason == "interrupted in scratch at step 5"
    notes = run_chain(interrupted)
    assert "resumed in scratch at step 5" in notes.lines
    assert not (interrupted.folder / "training").exists()
    # The stage that was superseded need not be trained again.
    reason = "recipe changed (optimizer.clip_norm: 1.0 → 0.5)"
    (superseded,) = (interrupted.folder / "superseded").iterdir()
    planned = other.plan()[0]
    assert planned.reason == f"{reason}; superseded/{superseded.name} has the same inputs and moves back"
    digest = record_of(interrupted, "baseline").digest
    assert run_chain(other).steps == 0
    assert other.plan()[0].status == "done"
    assert [path.name for path in superseded.parent.iterdir()] == [f"baseline-{str(digest)[:12]}"]


def test_clean_lists_what_is_kept_and_asks(
    interrupted: Chain, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clean(*options: str) -> str:
        result = CliRunner().invoke(app, ["clean", "--runs", str(interrupted.runs), *options], input="n\n")
        return result.output

    assert "baseline: 5 steps, saved 20" in clean()
    assert interrupted.plan()[0].reason == "interrupted in scratch at step 5"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _interrupt)
        clean("--yes")
    assert interrupted.plan()[0].reason == "not built yet"  # It cannot be resumed from what is left.
    assert "baseline: 5 steps" in clean("--yes")
    assert "no interrupted trainings" in clean()
    shutil.copytree(finished[0].folder / "phase1", interrupted.folder / "superseded" / "phase1-0123")
    assert "no interrupted trainings" in clean()
    assert "phase1: 13 steps" in clean("--superseded")
    assert "(superseded)" in clean("--superseded", "--yes")
    assert not (interrupted.folder / "superseded").exists()


def _interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt
