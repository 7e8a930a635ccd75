"""The measurements of `hpcm compare`, on very small codecs."""

import json
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mini import Notes, mini_codec
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.records import Records
from typer.testing import CliRunner

from modules import preset_config
from pipeline.chain.chain import Chain
from pipeline.commands.main import app
from pipeline.evaluation.coding import macs_per_pixel
from pipeline.evidence import comparison
from pipeline.evidence.comparison import Comparison, ComparisonError, Contender, Plan
from pipeline.evidence.comparison_display import tables
from pipeline.evidence.measurement import Subject, measure_memory, photograph, within_memory
from pipeline.recipes.loading import load_recipe
from pipeline.weights.checkpoints import CheckpointError, codec_tensors, load_codec, publish, write
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage


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
    sizes, *times = tables(measured)
    assert [row[0] for row in sizes.rows] == ["phase0", "phase4"]
    assert sizes.rows[0][-1] == "1.00"
    assert "(1.00)" in times[0].rows[0][1]
    assert times[0].columns == ("codec", "forward", "encode", "decode", "frozen", "unfrozen")
    assert times[0].rows[0][4] == "–"
    assert times[1].columns == ("codec", "forward", "encode", "decode")
    assert [table.title.split(":")[0] for table in times] == ["128×128", "128×192"]


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
    """Ends like a process that the kernel kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(*_: object) -> None:
    """Fails as PyTorch does on a CPU."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("end", [killed, out_of_memory])
def test_more_memory_than_there_is_gives_no_figure(end: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evidence.measurement._peak", end)
    assert measure_memory(contenders(0)[0], (128, 128), "decode", "cpu") is None


def test_a_photograph_of_any_size() -> None:
    small, large = photograph((64, 96)), photograph((1200, 1700))
    assert small.shape == (1, 3, 64, 96)
    assert large.shape == (1, 3, 1200, 1700)
    assert torch.equal(large[:, :, :64, :96], small)


def test_checkpoints_find_their_parents(finished: tuple[Chain, Notes], tmp_path: Path) -> None:
    paths = [task.checkpoint for task in finished[0].tasks]
    found = comparison.of_checkpoints([paths[0], paths[2], paths[3]])
    assert [contender.name for contender in found] == ["baseline", "phase2", "phase3"]
    assert [contender.parent for contender in found] == [None, None, found[1].config]
    ours, theirs = found[2].build("cpu").state_dict(), load_codec(paths[3]).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ComparisonError, match="given twice"):
        comparison.of_checkpoints([paths[0], paths[0]])


def test_checkpoints_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / f"{folder}/phase4.safetensors" for folder in ("λ=1", "2")]
    for path in paths:
        publish(path, mini_codec(4), Lineage(name="phase4"))
    publish(tmp_path / "baseline.safetensors", mini_codec(0), Lineage(name="baseline"))
    found = comparison.of_checkpoints([*paths, tmp_path / "baseline.safetensors"])
    assert [contender.name for contender in found] == ["λ-1/phase4.safetensors", "2/phase4.safetensors", "baseline"]


def test_a_parent_is_found_by_its_digest(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("other", "parent", "child")]
    for path, phase in zip(paths[:2], (0, 1), strict=True):
        publish(path, mini_codec(phase), Lineage(name="parent"))
    lineage = Lineage(name="child", stage="parent: parent", inputs={"parent": read_digest(paths[1])})
    publish(paths[2], mini_codec(2), lineage)
    found = comparison.of_checkpoints(paths)
    assert found[2].parent == found[1].config


def test_a_configuration_of_no_codec_is_named(tmp_path: Path) -> None:
    write(tmp_path / "odd", codec_tensors(mini_codec(0)), {"config": {"M": "many"}})
    with pytest.raises(CheckpointError, match="odd: its configuration is not valid"):
        comparison.of_checkpoints([tmp_path / "odd"])


def test_a_codec_like_its_parent_has_no_frozen_step() -> None:
    config = mini_codec(1).config
    plan = Plan(sizes=(), train_sizes=((64, 64),), rounds=1, memory=False)
    found = comparison.compare("mini", [Contender("control1", config, None, config)], plan, "cpu", lambda line: None)
    assert [cost.activity for cost in found.costs] == ["unfrozen"]


def test_what_does_not_fit_is_left_out_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evidence.measurement.Subject._decode", out_of_memory)
    monkeypatch.setattr("pipeline.evidence.measurement.nn.utils.clip_grad_norm_", out_of_memory)
    plan = Plan(sizes=((64, 64),), train_sizes=((64, 64),), rounds=1, memory=False)
    notes: list[str] = []
    found = comparison.compare("mini", contenders(0, 1), plan, "cpu", notes.append)
    assert {(cost.codec, cost.activity) for cost in found.costs} == {
        (codec, activity) for codec in ("phase0", "phase1") for activity in ("forward", "encode")
    }
    assert "64×64 decode of phase1: out of memory; left out" in notes

    monkeypatch.setattr("pipeline.evidence.measurement.Subject", out_of_memory)
    with pytest.raises(ComparisonError, match="nothing fits into the memory of cpu"):
        comparison.compare("mini", contenders(0), plan, "cpu", notes.append)


@pytest.mark.parametrize(
    ("error", "memory"), [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("a bug"), False)]
)
def test_only_a_lack_of_memory_is_passed_over(error: Exception, memory: bool) -> None:
    def fail() -> None:
        raise error

    with nullcontext() if memory else pytest.raises(RuntimeError, match="a bug"):
        assert within_memory(fail) is None


def test_a_step_that_failed_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evidence.measurement.nn.utils.clip_grad_norm_", out_of_memory)
    subject = Subject(contenders(0)[0], photograph((64, 64)), "cpu")
    assert within_memory(subject.activity("unfrozen")) is None
    assert all(p.grad is None and not p.requires_grad for p in subject.model.parameters())


def test_an_optimizer_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    adam = torch.optim.Adam
    monkeypatch.setattr("torch.optim.Adam", lambda *args, **kwargs: built.append(1) or adam(*args, **kwargs))
    subject = Subject(contenders(0)[0], photograph((64, 64)), "cpu")
    for _ in range(2):
        subject.activity("unfrozen")()
    assert len(built) == 1


def test_counting_draws_no_weights() -> None:
    before = torch.get_rng_state()
    macs_per_pixel(preset_config("tiny", 4))
    assert torch.equal(torch.get_rng_state(), before)


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
    paths = [str(finished[0].tasks[number].checkpoint) for number in (0, 1)]
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
        ("--preset=tiny", "--recipe=tiny", "give one of checkpoints"),
        ("--preset=tiny", "baseline.safetensors", "give one of checkpoints"),
        ("--device", "xpu", "give cpu, cuda or cuda:N"),
        ("--device", "hpu", "give cpu, cuda or cuda:N"),
        ("--device", "meta", "give cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_measured_is_named(
    option: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["compare", option, value])
    assert done.exit_code == 2
    assert message in done.output
