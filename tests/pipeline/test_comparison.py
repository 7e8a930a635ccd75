"""What `hpcm compare` measures, on codecs small enough to take no time."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from mini import Notes, mini_codec
from typer.testing import CliRunner

from modules import preset_config
from pipeline import comparison
from pipeline.chain import Chain
from pipeline.checkpoints import CheckpointError, load_codec
from pipeline.cli import app
from pipeline.comparison import Comparison, Contender, Plan
from pipeline.comparison_display import grids
from pipeline.costs import Subject, measure_memory, photograph
from pipeline.outbox import Outbox
from pipeline.recipe import load_recipe
from pipeline.records import Records


def contenders(*phases: int) -> list[Contender]:
    """The mini recipe's codec at these phases, each grown from the one before."""
    configs = [mini_codec(phase).config for phase in range(5)]
    return [Contender(f"phase{p}", configs[p], None, configs[p - 1] if p else None) for p in phases]


@pytest.fixture(scope="module")
def measured() -> Comparison:
    plan = Plan(sizes=((128, 128), (128, 192)), train_sizes=((128, 128),), rounds=2, memory=False)
    return comparison.compare("mini", contenders(0, 4), plan, "cpu", lambda line: None)


def test_everything_that_can_be_measured_is(measured: Comparison) -> None:
    found = {(cost.codec, cost.size, cost.activity) for cost in measured.costs}
    coding = {
        (c, s, a) for c in ("phase0", "phase4") for s in ("128×128", "128×192") for a in ("forward", "encode", "decode")
    }
    training = {("phase0", "128×128", "unfrozen"), ("phase4", "128×128", "frozen"), ("phase4", "128×128", "unfrozen")}
    assert found == coding | training
    assert all(len(cost.samples) == 2 and min(cost.samples) > 0 for cost in measured.costs)
    assert all(cost.ratio == 1 for cost in measured.costs if cost.codec == "phase0")
    frozen = measured.cost("phase4", "128×128", "frozen")
    assert frozen is not None
    assert frozen.ratio is None  # phase0 has nothing new


def test_counts_are_those_of_the_codecs(measured: Comparison) -> None:
    assert measured.parameters == {f"phase{p}": sum(x.numel() for x in mini_codec(p).parameters()) for p in (0, 4)}
    assert measured.kmacs_per_pixel["phase4"] > measured.kmacs_per_pixel["phase0"] > 0


def test_a_comparison_survives_json(measured: Comparison) -> None:
    assert Comparison.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_tables_show_ratios_to_the_first(measured: Comparison) -> None:
    sizes, *times = grids(measured)
    assert [row[0] for row in sizes.rows] == ["phase0", "phase4"]
    assert sizes.rows[0][-1] == "1.00"
    assert "(1.00)" in times[0].rows[0][1]
    assert times[0].columns == ("codec", "forward", "encode", "decode", "frozen", "unfrozen")
    assert times[0].rows[0][4] == "–"
    assert times[1].columns == ("codec", "forward", "encode", "decode")
    assert [grid.title.split(":")[0] for grid in times] == ["128×128", "128×192"]


def test_a_frozen_step_changes_only_what_is_new() -> None:
    (contender,) = contenders(1)
    assert all(name.startswith("attn_s3.") for name in contender.new_names())
    subject = Subject(contender, photograph((128, 128)), "cpu")
    seen = []
    for transform in (subject.model.g_a, subject.model.g_s):
        transform.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    subject.activity("frozen")()
    assert seen == [subject.model.g_a]
    subject.activity("unfrozen")()
    assert seen == [subject.model.g_a, subject.model.g_a, subject.model.g_s]


def test_memory_is_that_of_a_process_of_its_own() -> None:
    (contender,) = contenders(0)
    hog = torch.ones(64 * 2**20)  # 256 MiB here, which must not count there
    found = measure_memory(contender, (128, 128), "decode", "cpu")
    assert hog.sum() > 0
    assert found is not None
    assert 0 < found < 200 * 2**20


def killed(*_: object) -> None:
    """Ends as a process does that the kernel kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_more_memory_than_there_is_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.costs._peak", killed)
    assert measure_memory(contenders(0)[0], (128, 128), "decode", "cpu") is None


def test_a_photograph_of_any_size() -> None:
    small, large = photograph((64, 96)), photograph((1200, 1700))
    assert small.shape == (1, 3, 64, 96)
    assert large.shape == (1, 3, 1200, 1700)
    assert torch.equal(large[:, :, :64, :96], small)


def test_checkpoints_find_their_parents(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    paths = [job.checkpoint for job in finished[0].jobs]
    found = comparison.of_checkpoints([paths[0], paths[2], paths[3]])
    assert [contender.name for contender in found] == ["baseline", "phase2", "phase3"]
    assert [contender.parent for contender in found] == [None, None, found[1].config]
    ours, theirs = found[2].build("cpu").state_dict(), load_codec(paths[3]).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(CheckpointError, match="a second codec named 'baseline'"):
        comparison.of_checkpoints([paths[0], paths[0]])


def test_a_recipe_gives_each_codec_once() -> None:
    found = comparison.of_recipe(load_recipe("evidence"))
    names = [contender.name for contender in found]
    assert names[0] == "baseline"
    assert {"phase1", "phase4"} <= set(names)
    assert not any(name.startswith("control") for name in names)
    by_name = {contender.name: contender for contender in found}
    assert by_name["phase2"].parent == by_name["phase1"].config
    larger = comparison.of_recipe(load_recipe("evidence", ["model.preset=base"]))
    assert [contender.name for contender in larger] == names
    assert larger[0].config == preset_config("base")


def test_the_command_leaves_files_and_an_mlflow_run(finished: tuple[Chain, Notes], runs: Path) -> None:
    paths = [str(finished[0].jobs[number].checkpoint) for number in (0, 1)]
    sizes = ["--size", "128x128", "--train-size", "128x128", "--rounds", "1", "--no-memory"]
    done = CliRunner().invoke(app, ["compare", *paths, *sizes, "--runs", str(runs)])
    assert done.exit_code == 0, done.output
    folder = runs / "comparisons" / "checkpoints-cpu"
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.png"}
    kept = [comparison.read(path) for path in Records(runs).artifacts_of_kind("comparison", "comparison.json")]
    assert kept[-1] == comparison.read(folder / "comparison.json")
    assert kept[-1].trained
    assert Records(runs).chains() == []


def test_a_comparison_kept_elsewhere_is_sent_by_sync(
    measured: Comparison, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outbox.close, "__defaults__", (0.0,))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(comparison, "compare", lambda *given: measured)
    done = CliRunner().invoke(app, ["compare", "-o", str(tmp_path / "elsewhere"), "--runs", str(runs)])
    assert done.exit_code == 0, done.output
    assert f"written to {tmp_path / 'elsewhere'}\n" in done.output
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert CliRunner().invoke(app, ["sync", "--runs", str(runs)]).exit_code == 0
    (kept,) = Records(runs).artifacts_of_kind("comparison", "comparison.json")
    assert comparison.read(kept) == measured


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "512", "HEIGHTxWIDTH"),
        ("--preset", "huge", "unknown preset"),
        ("--device", "cuda", "no CUDA device"),
        ("--set", "seed=1", "give --recipe as well"),
    ],
)
def test_what_cannot_be_measured_is_named(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["compare", option, value])
    assert done.exit_code == 2
    assert message in done.output
