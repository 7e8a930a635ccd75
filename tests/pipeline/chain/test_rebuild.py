"""What makes a stage stale, what a user is asked, and how a new stage takes the place of an old one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mini import FOLDER, Finished, Hpcm, Notes, begun, copied, history, interrupt, mini_chain, record_of, run_chain
from PIL import Image

from pipeline.chain import publication
from pipeline.chain import run as run_module
from pipeline.chain import stage_task as task_module
from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError
from pipeline.chain.stage_codec import StageError
from pipeline.common.folder_lock import FolderInUse, held
from pipeline.evidence.audit import audit


@pytest.fixture
def built(finished: Finished, tmp_path: Path) -> Chain:
    """A chain to Phase 1 that is current. A test may change it."""
    return copied(finished[0], tmp_path / "built", "phase1")


class Asked:
    """Refuses, and keeps what it was asked."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, consequences: list[str]) -> None:
        self.lines += consequences
        raise ChainError("nothing was changed")


def test_a_change_of_inputs_makes_a_stage_and_its_children_stale(
    built: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reasons(*settings: str) -> list[str]:
        return [planned.reason for planned in mini_chain(built.runs, "phase1", settings).plan()]

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (128, 128)).save(photos / "black.png")
    assert reasons() == ["current", "current"]
    assert reasons("log_every=7", "accept.psnr_drop=9.0", "gradient_checkpointing=true") == ["current", "current"]
    elsewhere = "current; its results are of other images (photos): `hpcm evaluate` measures it on these"
    assert reasons(f"data.val={photos}") == [elsewhere, elsewhere]
    assert reasons(f"phase1.data.train={photos}") == ["current", "stale: training images changed"]
    assert reasons("baseline.ema=0.9") == ["stale: recipe changed (ema: null → 0.9)", "waits for baseline"]
    monkeypatch.setattr(task_module, "CODE_VERSION", "of tomorrow")
    assert reasons() == ["stale: code version changed", "waits for baseline"]


def test_chains_of_other_seeds_lie_beside_the_first(finished: Finished) -> None:
    assert mini_chain(finished[0].runs, "phase1", ["lmbda=0.0130000001"]).folder.name == "lmbda-0.0130000001"
    chain = mini_chain(finished[0].runs, "phase1", ["seed=3"])
    assert chain.folder.name == "lmbda-0.013-seed-3"
    assert [planned.status for planned in chain.plan()] == ["missing", "missing"]
    # A change of a stage's own seed makes that stage stale, as any setting does.
    chain = mini_chain(finished[0].runs, "phase1", ["phase1.seed=3"])
    assert chain.folder == finished[0].folder
    assert [planned.status for planned in chain.plan()] == ["done", "stale"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": "a"}'])
def test_a_damaged_record_makes_a_stage_stale(built: Chain, content: str) -> None:
    record = built.tasks[0].folder / "record.json"
    record.write_text(content)
    assert built.plan()[0].reason.startswith(f"stale: {record}: damaged: ")


def test_rebuilding_stale_stages_is_asked_first(finished: Finished, tmp_path: Path) -> None:
    built, asked = copied(finished[0], tmp_path, "phase2"), Asked()
    before = sorted(path.stat().st_mtime_ns for path in built.folder.rglob("*") if path.name != "lock")
    change = ["phase1.data.batch_size=1", "phase1.schedule.frozen.lr={new: 2.0e-3}", "phase1.schedule.align.steps=0"]
    with pytest.raises(ChainError, match="nothing was changed"):
        run_chain(mini_chain(built.runs, "phase2", change), confirm=asked)
    moves = f"the published stage moves to {built.folder / 'superseded'}"
    assert asked.lines == [
        "phase1: stale: recipe changed (data.batch_size: 2 → 1, schedule.align.steps: 2 → 0, "
        f'schedule.frozen.lr: {{"new": 0.001}} → {{"new": 0.002}}); it is rebuilt, and {moves}',
        f"phase2: if phase1 changes, it is rebuilt, and {moves}",
    ]
    assert sorted(path.stat().st_mtime_ns for path in built.folder.rglob("*") if path.name != "lock") == before


def test_a_run_without_what_the_recipe_is_meant_for_is_asked_first(runs: Path) -> None:
    chain, asked = mini_chain(runs, "baseline", ["needs=[gpu, images]"]), Asked()
    with pytest.raises(ChainError, match="nothing was changed"):
        run_chain(chain, confirm=asked)
    assert asked.lines == [
        "mini is meant for a GPU, and PyTorch finds none here: on the CPU it takes very long",
        "mini is meant for a data set, and none is given (--data; with make: DATA=): it would train on the 6 packaged "
        "photographs",
    ]
    assert chain.plan()[0].status == "missing"


def test_force_builds_a_current_stage_again_and_keeps_the_old_one_until_then(built: Chain) -> None:
    before, asked = built.tasks[1].checkpoint.read_bytes(), Asked()
    with pytest.raises(ChainError, match="nothing was changed"):
        run_chain(mini_chain(built.runs, "phase1"), confirm=asked, force=True)
    assert asked.lines == [f"phase1: the published stage moves to {built.folder / 'superseded'}"]
    interrupt(built, "frozen", 2, force=True)
    assert built.tasks[1].checkpoint.read_bytes() == before
    notes = run_chain(built)
    assert notes.lines[:2] == ["baseline: done", "phase1: interrupted in frozen at step 2"]
    assert built.tasks[1].checkpoint.read_bytes() == before
    (superseded,) = (built.folder / "superseded").iterdir()
    assert (superseded / "checkpoint.safetensors").read_bytes() == before
    assert record_of(built, "phase1").key != json.loads((superseded / "record.json").read_text())["key"]
    chains, problems = audit(built.runs)
    assert [*problems, *(line for chain in chains for stage in chain.stages for line in stage.problems)] == []


def test_a_damaged_parent_is_found_before_anything_is_asked_or_moved(built: Chain) -> None:
    interrupt(built, "align", 1, force=True)
    path, asked = built.tasks[0].checkpoint, Asked()
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    before = sorted(path for path in built.folder.rglob("*") if path.name != "lock")
    changed = mini_chain(built.runs, "phase1", ["phase1.data.batch_size=1"])
    for chain, options in ((built, {}), (built, {"fresh": True}), (built, {"force": True}), (changed, {})):
        with pytest.raises(StageError, match=rf"{path}: changed after it was (?s:.*) hpcm run baseline --force"):
            run_chain(chain, confirm=asked, **options)
    assert asked.lines == []
    assert sorted(path for path in built.folder.rglob("*") if path.name != "lock") == before


def test_a_damaged_superseded_stage_does_not_move_back(built: Chain) -> None:
    (built.folder / "superseded").mkdir()
    built.tasks[1].folder.rename(aside := built.folder / "superseded" / "phase1-0123")
    assert built.plan()[1].status == "superseded"
    path = aside / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert built.plan()[1].status == "missing"


def test_a_kill_within_publication_loses_nothing(built: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rebuild is killed at each place in turn; nothing is trained twice."""
    chain = mini_chain(built.runs, "baseline", ["optimizer.clip_norm=0.5"])
    steps = 0
    for place in ("publish.checkpoint", "publish.record", "publish.superseded", "publish.renamed"):

        def killed(passed: str, place: str = place) -> None:
            if passed == place:
                raise KeyboardInterrupt

        notes = Notes()
        monkeypatch.setattr(publication, "fault", killed)
        with pytest.raises(KeyboardInterrupt):
            run_chain(chain, notes)
        steps += notes.steps
    assert steps == 6
    assert chain.plan()[0].status == "done"
    assert record_of(chain, "baseline").status == "done"
    assert len(list((chain.folder / "superseded").iterdir())) == 1
    monkeypatch.undo()
    run_chain(chain)
    assert not any(path.is_file() for path in chain.tasks[0].trainings.rglob("*"))


def test_fresh_restarts_what_was_interrupted(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, asked = mini_chain(runs, "baseline"), Asked()
    interrupt(chain, "scratch", 5)
    key = begun(chain, "baseline").key
    with pytest.raises(ChainError, match="nothing was changed"):
        run_chain(chain, confirm=asked, fresh=True)
    assert asked.lines == [f"baseline: the interrupted training moves to {chain.folder / 'abandoned'}"]
    assert chain.plan()[0].reason == "interrupted in scratch at step 5"

    def killed(place: str) -> None:
        if place == "abandon":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "fault", killed)
        with pytest.raises(KeyboardInterrupt):
            run_chain(chain, fresh=True)
    notes = run_chain(chain)
    assert notes.steps == 6
    assert [step for step, _ in history(chain.tasks[0].folder)["train/scratch/loss"]] == [2, 4, 6]
    (abandoned,) = (chain.folder / "abandoned" / "baseline").glob("*/record.json")
    assert json.loads(abandoned.read_text())["key"] == key != record_of(chain, "baseline").key


def test_where_nobody_can_be_asked_nothing_is_changed(built: Chain, hpcm: Hpcm) -> None:
    before = sorted(path for path in built.folder.rglob("*") if path.name != "lock")
    said = hpcm("run", "phase1", "--recipe", FOLDER, "--runs", built.runs, "--force", code=1).err
    assert "no terminal for the question; give --yes" in said
    assert sorted(path for path in built.folder.rglob("*") if path.name != "lock") == before


def test_a_second_run_names_the_process_that_uses_the_folder(runs: Path) -> None:
    chain = mini_chain(runs, "baseline")
    script = "import sys, time; from pathlib import Path; from pipeline.common.folder_lock import held\n"
    script += "with held(Path(sys.argv[1])):\n    print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", script, str(chain.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as holder:
        holder.stdout.readline()
        message = rf"{chain.folder}: process {holder.pid} on \S+, since 20.*, is using this folder; wait for it to end"
        with pytest.raises(FolderInUse, match=message):
            run_chain(chain)
        holder.kill()
    with held(chain.folder):  # The lock of a dead process does not block the next run.
        assert f"process {os.getpid()} on" in (chain.folder / "lock").read_text()


def test_a_damaged_identity_is_an_error(built: Chain) -> None:
    (built.folder / "chain.json").write_text(json.dumps(["?"]))
    with pytest.raises(ChainError, match=r"chain.json: damaged: .*(?s:.*)Delete the file"):
        run_chain(built)
