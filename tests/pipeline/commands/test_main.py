"""The command line: short error messages, exit codes, kills and several processes."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mini
import pytest
from mini import ENVIRONMENT, FOLDER, PHOTOS, Hpcm, history, mini_chain, record_of
from typer.testing import CliRunner

from pipeline.commands import main as cli
from pipeline.commands.lazy import imported_when_called
from pipeline.common.packaged import WEIGHTS, recipe_names


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["plan", "phase1", "--recipe", FOLDER, "--set", "phase1.schedule.1.hand_over=4"],
            ["--set phase1.schedule.1.hand_over=4", "schedule[1].hand_over", "did you mean 'handover'"],
        ),
        (["plan", "phase1", "--recipe", FOLDER, "--data", __file__], ["test_main.py: not a folder; give a folder of"]),
        (["run", "baseline", "--recipe", FOLDER, "--runs", __file__], ["test_main.py/mini/lmbda-0.013: Not a direct"]),
        (["import", FOLDER, "baseline.safetensors"], ["mini: a folder, not a file"]),
        (["audit", "--runs", "nowhere"], ["nothing was run in", "choose a folder with --runs"]),
    ],
)
def test_bad_input_is_one_screen_that_says_what_to_do(arguments: list[object], expected: list[str], hpcm: Hpcm) -> None:
    message = hpcm(*arguments, code=1).err
    assert message.startswith("error: ")
    assert len(message.splitlines()) < 24
    for phrase in expected:
        assert phrase in message


@pytest.mark.parametrize("command", [name for panel in cli.COMMANDS.values() for name in panel])
def test_every_command_is_found_and_explains_its_options(command: str, hpcm: Hpcm) -> None:
    assert f"{command} [OPTIONS]" in hpcm(command, "-h").out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "rd-curve"),
        (["plan", "phase4", "--recipe", FOLDER], "waits for phase3"),
        (["run", "phase4", "--set", "data.crops=5"], "did you mean 'crop'"),
        (["info", WEIGHTS / "lean.safetensors", WEIGHTS / "conformance" / "lean-odd.hpcm"], "181×197"),
    ],
    ids=["help", "plan", "mistake", "info"],
)
def test_quick_answers_do_not_wait_for_pytorch(arguments: list[object], expected: str, tmp_path: Path) -> None:
    code = """if True:
        import atexit, sys
        atexit.register(lambda: print({"torch", "mlflow", "matplotlib", "scipy"} & sys.modules.keys()))
        from pipeline.commands import main as cli
        cli.main()"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert expected in done.stdout + done.stderr
    assert done.stdout.endswith("set()\n")


def test_the_shell_completes_recipes_and_stages() -> None:
    def completed(line: str) -> set[str]:
        words = {"_HPCM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        done = CliRunner(env=words).invoke(cli.app, prog_name="hpcm")
        return set(done.output.split())

    assert completed("hpcm plan --recipe ") == set(recipe_names())
    assert completed("hpcm run --recipe evidence le") == {"lean", "lean-conv"}
    assert completed("hpcm run phase") == {"phase1", "phase2", "phase3", "phase4"}


def test_the_plan_as_json(tmp_path: Path, hpcm: Hpcm) -> None:
    plan = json.loads(hpcm("plan", "phase1", "--recipe", FOLDER, "--runs", tmp_path, "--json").out)
    statuses = [(stage["name"], stage["status"]) for stage in plan["stages"]]
    assert statuses == [("baseline", "missing"), ("phase1", "missing")]
    assert plan["stages"][1]["segments"][0] == {"name": "align", "steps": 2}


def test_a_run_that_gets_a_signal_saves_and_continues_there(stored_runs: Path) -> None:
    settings = ["baseline.schedule.scratch.steps=30"]
    options = "--recipe", FOLDER, "--val", PHOTOS, "--runs", stored_runs, "--set", *settings
    command = mini.hpcm("run", "baseline", *options, "-v")
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as first:
        for line in first.stderr:
            if line.strip().startswith("scratch 10/"):
                first.send_signal(signal.SIGTERM)
                break
        first.stderr.read()
        assert first.wait(timeout=60) == 143

    chain = mini_chain(stored_runs, "baseline", settings)
    reason = chain.plan()[0].reason
    assert reason.startswith("interrupted in scratch at step ")
    stood = int(reason.rsplit(" ", 1)[1])
    assert stood >= 9
    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed in scratch at step {stood}" in resumed.stdout
    assert " training images (photographs in the wheels of " in resumed.stdout
    assert f"hpcm ui --runs {stored_runs}" in resumed.stdout

    record = record_of(chain, "baseline")
    assert record.status == "done"
    assert len(record.attempts) == 2
    logged = {key: [step for step, _ in values] for key, values in history(chain.folder / "baseline").items()}
    assert all(steps == sorted(set(steps)) for steps in logged.values())
    assert logged["train/scratch/bpp"] == list(range(2, 31, 2))


def test_of_two_launched_processes_one_speaks_and_warnings_are_shown(stored_runs: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(PHOTOS, tmp_path / "photos")
    shutil.copy(photos / "coffee.jpg", photos / "cut.jpg")
    os.truncate(photos / "cut.jpg", 3000)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "pipeline")
    sweep = ["rd-curve", "baseline", "--recipe", FOLDER, "--val", PHOTOS, "--data", photos, "--lmbda", "0.013"]
    sweep += ["--runs", stored_runs]
    command = mini.hpcm(*sweep, launcher=launcher)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("after scratch: ") == 1
    assert "cut.jpg: cannot be read" in done.stderr
    assert mini_chain(stored_runs, "baseline", [f"data.train={photos}"]).plan()[0].status == "done"
    second = {**ENVIRONMENT, "RANK": "1"}
    done = subprocess.run(mini.hpcm(*sweep, "--plan"), env=second, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "")


def test_objects_made_after_the_first_import_may_become_garbage() -> None:
    dumped = imported_when_called("json:dumps")
    dumped(1)
    frozen, made = gc.get_freeze_count(), [[number] for number in range(9)]
    assert dumped(made[:1]) == "[[0]]"
    assert gc.get_freeze_count() == frozen
