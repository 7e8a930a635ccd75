"""What a plan notices, what a user can rebuild, and which run holds a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from mini import ENVIRONMENT, FOLDER, Notes, Stop, hpcm, mini_chain, run_chain, runs_of, steps_of
from PIL import Image
from typer.testing import CliRunner

from pipeline.chain import chain as chain_module
from pipeline.chain import stage_task as task_module
from pipeline.chain.chain import Chain, ChainError
from pipeline.chain.stage_task import Rebuild, RunContext
from pipeline.commands.confirmation import NotConfirmed
from pipeline.commands.main import app
from pipeline.common.errors import Interrupted
from pipeline.common.files import FileError
from pipeline.common.folder_lock import FolderInUse, held
from pipeline.common.processes import ProcessGroup
from pipeline.evidence.audit import audit
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store, find_run


@pytest.fixture
def built(finished: tuple[Chain, Notes], tmp_path: Path) -> Chain:
    """A chain to Phase 1 that is current. A test may change it."""
    shutil.copytree(finished[0].runs, tmp_path / "built")
    return mini_chain(tmp_path / "built", "phase1")


def rebuild(chain: Chain, confirm: Callable[[list[str]], None], **wish: bool) -> Notes:
    notes = Notes()
    with ProcessGroup(Accelerator(cpu=True)) as processes:
        chain.run(RunContext(chain.folder, processes, notes, True, Rebuild(**wish, confirm=confirm)))
    return notes


def refuse(consequences: list[str]) -> None:
    raise ChainError("nothing was changed")


def test_a_changed_code_version_is_noticed(built: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_module, "CODE_VERSION", "of tomorrow")
    assert [planned.reason for planned in built.plan()] == ["stale: code version changed", "waits for baseline"]


def test_changed_images_are_noticed(built: Chain, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (128, 128)).save(tmp_path / "photos" / "black.png")
    chain = mini_chain(built.runs, "phase1", [f"phase1.data.train={tmp_path / 'photos'}"])
    assert [planned.reason for planned in chain.plan()] == ["current", "stale: training images changed"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "a"}'])
def test_a_damaged_record_makes_a_stage_stale(built: Chain, content: str) -> None:
    built.tasks[0].record.write_text(content)
    assert built.plan()[0].reason.startswith(f"stale: {built.tasks[0].record}: damaged: ")


def test_a_training_in_another_form_is_passed_over_and_kept(runs: Path) -> None:
    chain = mini_chain(runs, "baseline")
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 5, signal.SIGTERM))
    other = mini_chain(runs, "baseline", ["optimizer.clip_norm=0.5"])
    assert other.plan()[0].reason == "not built yet; an interrupted training with other inputs is kept: recipe changed"
    with pytest.raises(Interrupted):
        run_chain(other, Stop("scratch", 2, signal.SIGTERM))
    assert other.plan()[0].reason == "cut off in scratch at step 2"
    assert chain.plan()[0].reason == "cut off in scratch at step 5"
    run_chain(other)
    # What the one form published is no reason to delete what the other one won.
    assert chain.plan()[0].reason == "stale: recipe changed (optimizer.clip_norm: 0.5 → 1.0)"
    notes = Notes()
    run_chain(chain, notes)
    assert "resumed in scratch at step 5" in notes.lines
    assert sum(run.data.tags.get("hpcm.stage") == "baseline" for run in runs_of(chain)[1]) == 2
    assert not (chain.folder / "states").exists()


def test_force_builds_a_current_stage_again(built: Chain) -> None:
    before, asked = built.tasks[1].checkpoint.read_bytes(), []
    notes = rebuild(built, asked.extend, force=True)
    assert asked == [f"phase1: the published stage moves to {built.folder / 'superseded'}"]
    assert notes.lines[:2] == ["baseline: done", "phase1: not built yet"]
    assert built.tasks[1].checkpoint.read_bytes() == before
    (aside,) = (built.folder / "superseded").iterdir()
    assert (aside / "checkpoint.safetensors").read_bytes() == before
    stages = [run.data.tags.get("hpcm.stage") for run in runs_of(built)[1]]
    assert stages.count("phase1") == 2  # The old run keeps what was logged to it.
    found = [stage for chain in audit(built.runs) for stage in chain.stages if stage.record.name == "phase1"]
    assert [(stage.files, stage.problems) for stage in found] == [("superseded", ()), ("verified", ())]
    shutil.rmtree(aside)
    assert audit(built.runs)[0].stages[1].problems != ()


def test_rebuilding_stale_stages_is_asked_first(built: Chain) -> None:
    before, asked = built.tasks[1].checkpoint.read_bytes(), []
    change = ["phase1.data.batch_size=1", "phase1.schedule.frozen.lr={new: 2.0e-3}", "phase1.schedule.align.steps=0"]

    def ask(consequences: list[str]) -> None:
        asked.extend(consequences)
        refuse(consequences)

    with pytest.raises(ChainError, match="nothing was changed"):
        rebuild(mini_chain(built.runs, "phase2", change), ask)
    moves = f"the published stage moves to {built.folder / 'superseded'}"
    assert asked == [
        "phase1: stale: recipe changed (data.batch_size: 2 → 1, schedule.align.steps: 2 → 0, "
        f'schedule.frozen.lr: {{"new": 0.001}} → {{"new": 0.002}}); it is rebuilt, and {moves}',
        f"phase2: if phase1 changes, it is rebuilt, and {moves}",
    ]
    assert built.tasks[1].checkpoint.read_bytes() == before


def test_a_run_without_what_the_recipe_is_meant_for_is_asked_first(runs: Path) -> None:
    chain, asked = mini_chain(runs, "baseline", ["needs=[gpu, images]"]), []

    def ask(consequences: list[str]) -> None:
        asked.extend(consequences)
        refuse(consequences)

    with pytest.raises(ChainError, match="nothing was changed"):
        rebuild(chain, ask)
    assert asked == [
        "mini is meant for a GPU, and PyTorch finds none here: on the CPU it takes very long",
        "mini is meant for a data set, and none is given (--data; with make: DATA=): it would train on the 6 packaged "
        "photographs",
    ]
    assert chain.plan()[0].status == "missing"


def test_fresh_begins_again_what_was_cut_off(runs: Path) -> None:
    chain, asked = mini_chain(runs, "baseline"), []
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 5, signal.SIGTERM))
    with pytest.raises(ChainError, match="nothing was changed"):
        rebuild(chain, refuse, fresh=True)
    assert chain.plan()[0].reason == "cut off in scratch at step 5"
    notes = rebuild(chain, asked.extend, fresh=True)
    assert asked == [f"baseline: the interrupted training moves to {chain.folder / 'abandoned'}"]
    assert notes.steps == 6
    assert list((chain.folder / "abandoned" / "baseline").glob("*/segment-*"))
    cut_off, whole = [run for run in runs_of(chain)[1] if "hpcm.stage" in run.data.tags]
    assert [run.info.status for run in (cut_off, whole)] == ["KILLED", "FINISHED"]


def test_a_kill_within_fresh_leaves_the_old_training_or_begins_a_new_one(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, notes = mini_chain(runs, "baseline"), Notes()
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 5, signal.SIGTERM))

    def killed(place: str) -> None:
        if place == "abandon":
            raise KeyboardInterrupt

    monkeypatch.setattr(chain_module, "fault", killed)
    with pytest.raises(KeyboardInterrupt):
        rebuild(chain, lambda consequences: None, fresh=True)
    monkeypatch.undo()
    run_chain(chain, notes)
    assert notes.steps == 6
    cut_off, whole = [run for run in runs_of(chain)[1] if "hpcm.stage" in run.data.tags]
    assert [run.info.status for run in (cut_off, whole)] == ["KILLED", "FINISHED"]
    assert min(steps_of(runs_of(chain)[0], whole)["train/scratch/loss"]) == 2


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_folder_that_is_moved_during_a_run_ends_it_and_resumes_elsewhere(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Move(Notes):
        def step(self, values: dict[str, float] | None) -> None:
            super().step(values)
            if self.steps == 5:
                runs.rename(tmp_path / "moved")

    monkeypatch.setattr(chain_module, "PATIENCE", 0.5)
    with pytest.raises(FileError, match=rf"{runs}\S*: cannot be written: No such file"):
        run_chain(mini_chain(runs, "baseline"), Move())
    chain, notes = mini_chain(tmp_path / "moved", "baseline"), Notes()
    assert chain.plan()[0].reason == "cut off in scratch at step 3"
    run_chain(chain, notes)
    assert notes.steps == 3
    client, logged = runs_of(chain)
    (stage,) = [run for run in logged if "hpcm.stage" in run.data.tags]
    steps = steps_of(client, stage)["train/scratch/loss"]
    assert steps == sorted(set(steps))
    assert not list(runs.rglob("*.safetensors"))


def test_clean_lists_what_was_interrupted_and_asks(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = mini_chain(runs, "baseline")
    with pytest.raises(Interrupted):
        run_chain(chain, Stop("scratch", 5, signal.SIGTERM))
    listed = CliRunner().invoke(app, ["clean", "--runs", str(runs)], input="n\n")
    assert "baseline: 5 steps, saved 20" in listed.output
    assert chain.plan()[0].reason == "cut off in scratch at step 5"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        CliRunner().invoke(app, ["clean", "--runs", str(runs), "--yes"])
    assert chain.plan()[0].reason == "not built yet"  # It cannot be resumed from what is left.
    done = CliRunner().invoke(app, ["clean", "--runs", str(runs), "--yes"])
    assert done.exit_code == 0, done.output
    assert "baseline: 5 steps" in done.output
    assert chain.plan()[0].reason == "not built yet"
    assert "no interrupted trainings" in CliRunner().invoke(app, ["clean", "--runs", str(runs)]).output


def test_where_nobody_can_be_asked_nothing_is_changed(built: Chain) -> None:
    before = sorted(built.folder.rglob("*"))
    command = ["run", "phase1", "--recipe", str(FOLDER), "--runs", str(built.runs), "--force"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, NotConfirmed)
    assert "no terminal for the question; give --yes" in str(result.exception)
    assert [path for path in sorted(built.folder.rglob("*")) if path.name != "lock"] == [
        path for path in before if path.name != "lock"
    ]


def test_a_second_run_is_told_who_holds_the_folder(runs: Path, tmp_path: Path) -> None:
    chain = mini_chain(runs, "baseline")
    script = "import sys, time; from pathlib import Path; from pipeline.common.folder_lock import held\n"
    script += "with held(Path(sys.argv[1])):\n    print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(chain.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        message = rf"{chain.folder}: process {holder.pid} on \S+, since 20.*, is using this folder; wait for it to end"
        with pytest.raises(FolderInUse, match=message):
            run_chain(chain)
        holder.kill()
    with held(chain.folder):  # The lock of a dead process does not block the next run.
        assert f"process {os.getpid()} on" in (chain.folder / "lock").read_text()


def test_sync_sends_what_waits(runs: Path, tmp_path: Path) -> None:
    folder = runs / "mini" / "lmbda-0.013" / "outbox"
    Outbox(folder, Store("http://127.0.0.1:9")).run("k", "a run").metrics({"loss": 1.0}, 3)
    assert (folder / "journal.jsonl").exists()
    command = hpcm("sync", "--runs", runs)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 log entries to send" in done.stdout
    client = Store.default(runs).client()
    assert client.get_run(find_run(client, "k")).data.metrics == {"loss": 1.0}
    assert not folder.exists()


def waiting_entries(runs: Path, name: str) -> Path:
    """The folder of a chain with log entries of the run with this key, which could not be sent to MLflow."""
    folder = runs / "mini" / name / "outbox"
    outbox = Outbox(folder, Store("http://127.0.0.1:9"))
    outbox.run(name, "a run")
    outbox.close(0)
    return folder


def test_sync_goes_on_after_a_chain_that_is_in_use_or_damaged(runs: Path) -> None:
    busy, damaged, free = (waiting_entries(runs, name) for name in ("a", "b", "c"))
    (damaged / "journal.jsonl").write_bytes(b"\xff\n")
    (busy.parent / "lock").write_text("process 1 on elsewhere, since yesterday,\n")
    script = "import fcntl, sys, time\n"
    script += "file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(busy.parent / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = CliRunner().invoke(app, ["sync", "--runs", str(runs)])
        holder.kill()
    assert done.exit_code == 1
    assert f"{busy.parent}: process 1 on elsewhere, since yesterday, is using this folder" in done.output
    assert f"{damaged / 'journal.jsonl'}: line 1: damaged" in done.output.replace("\n", "")
    assert busy.exists()
    assert damaged.exists()
    assert not free.exists()
    assert find_run(Store.default(runs).client(), "c")


def test_sync_of_no_folder_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["sync", "--runs", str(tmp_path / "nowhere")])
    assert done.exit_code == 2
    assert "no such folder" in done.output
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_identity_is_an_error(runs: Path) -> None:
    chain = mini_chain(runs, "baseline")
    chain.folder.mkdir(parents=True)
    (chain.folder / "chain.json").write_text(json.dumps(["?"]))
    with pytest.raises(ChainError, match=r"chain.json: damaged: .*(?s:.*)Delete the file"):
        run_chain(chain)
