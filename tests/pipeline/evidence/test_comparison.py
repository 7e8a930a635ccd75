"""The measurements of `hpcm compare`, on very small codecs."""

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import costs
from mini import Hpcm, mini_codec

from modules import preset_config
from pipeline.common.fresh_process import in_fresh_process, within_memory
from pipeline.evidence import comparison, contenders
from pipeline.evidence.comparison import Plan, tables
from pipeline.evidence.contenders import ComparisonError, Contender
from pipeline.recipes.loading import load_recipe
from pipeline.records.comparison import Comparison, read_comparisons
from pipeline.training.trial import Trainer
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage


def grown(*phases: int) -> list[Contender]:
    """The mini recipe's codec at these phases, each grown from the one before."""
    configs = [mini_codec(phase).config for phase in range(5)]
    return [Contender(f"phase{p}", configs[p], parent=configs[p - 1] if p else None) for p in phases]


@pytest.fixture(scope="module")
def measured() -> Comparison:
    plan = Plan(sizes=((64, 64), (64, 96)), train_sizes=((64, 64),), rounds=2, memory=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "SHORTEST", 1e-6)
        return comparison.compare("mini", grown(0, 4), plan, "cpu", lambda line: None)


def test_everything_that_can_be_measured_is(measured: Comparison) -> None:
    found = {(cost.codec, cost.size, cost.activity) for cost in measured.costs}
    coding = {(c, s, a) for c in ("phase0", "phase4") for s in ("64×64", "64×96") for a in ("encode", "decode")}
    training = {("phase0", "64×64", "unfrozen"), ("phase4", "64×64", "frozen"), ("phase4", "64×64", "unfrozen")}
    assert found == coding | training
    assert all(len(cost.samples) == 2 and min(cost.samples) > 0 for cost in measured.costs)
    assert all(measured.ratios(cost)[0] == 1 for cost in measured.costs if cost.codec == "phase0")
    assert measured.ratios(measured.of("64×64", "frozen")["phase4"]) == (None, None)  # phase0 has nothing new
    assert {size.codec: size.parameters for size in measured.codecs} == {
        f"phase{p}": sum(x.numel() for x in mini_codec(p).parameters()) for p in (0, 4)
    }
    assert measured.codecs[1].kmacs_per_pixel > measured.codecs[0].kmacs_per_pixel > 0


def test_tables_show_ratios_to_the_first(measured: Comparison) -> None:
    sizes, *times = tables(measured)
    assert sizes.rows[0][::3] == ("phase0", "1.00")
    assert [table.title.split(":")[0] for table in times] == ["64×64", "64×96"]
    assert [table.columns for table in times] == [
        ("codec", "encode", "decode", "frozen", "unfrozen"), ("codec", "encode", "decode"),
    ]  # fmt: skip
    assert "(1.00)" in times[0].rows[0][1]
    assert times[0].rows[0][3] == "–"
    made = list(tables(costs(0.7)))[1]
    assert made.columns[3:] == ("decode", "memory, decode", "unfrozen", "memory, unfrozen")
    assert made.rows[1] == ("phase4", *("1.400 (0.70)", "100 (0.50)") * 3)
    (axis, _) = comparison.draw(measured).axes
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["encode", "decode", "training step"]  # the first codec has no frozen step to compare with


def test_a_comparison_reads_back_as_written(measured: Comparison, tmp_path: Path) -> None:
    measured.write(tmp_path / "comparisons" / "mini-2")
    replace(measured, time=measured.time - 1).write(tmp_path / "comparisons" / "mini-1")
    assert [found.time for found in read_comparisons(tmp_path)] == [measured.time - 1, measured.time]
    assert read_comparisons(tmp_path)[1] == measured
    assert comparison.new_folder(tmp_path, "mini").name == "mini-3"


def test_a_frozen_step_trains_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[set[str]] = []

    def keep(self: Trainer, state: object) -> None:
        trained.append({name.split(".")[0] for name in self.migration.new})
        assert self.stage.schedule[0].train == "new"

    monkeypatch.setattr(Trainer, "train", keep)
    grown(1)[0].seconds("frozen", (128, 128), "cpu")
    assert trained == [{"attn_s3"}]


def test_memory_is_that_of_a_process_of_its_own() -> None:
    hog = torch.ones(64 * 2**20)  # 256 MiB here, which must not count there
    found = in_fresh_process(grown(0)[0].peak, "encode", (128, 128), "cpu")
    assert hog.sum() > 0
    assert 0 < found < 200 * 2**20


def killed(*_: object) -> None:
    """Ends like a process that the kernel kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(*_: object, **__: object) -> None:
    """Fails as PyTorch does on a CPU."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("end", [killed, out_of_memory])
def test_a_process_that_needs_too_much_memory_gives_no_figure(end: object) -> None:
    assert in_fresh_process(end) is None  # type: ignore[arg-type]


def test_what_does_not_fit_is_left_out_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contender, "_step", out_of_memory)
    plan = Plan(sizes=((64, 64),), train_sizes=((64, 64),), rounds=1, memory=False)
    notes: list[str] = []
    found = comparison.compare("mini", grown(0, 1), plan, "cpu", notes.append)
    assert {cost.activity for cost in found.costs} == {"encode", "decode"}
    assert "64×64 frozen of phase1: out of memory; left out" in notes
    monkeypatch.setattr(Contender, "_coding", out_of_memory)
    with pytest.raises(ComparisonError, match="nothing fits into the memory of cpu"):
        comparison.compare("mini", grown(0), plan, "cpu", notes.append)


@pytest.mark.parametrize(
    ("error", "memory"), [(torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("a bug"), False)]
)
def test_only_a_lack_of_memory_is_passed_over(error: Exception, memory: bool) -> None:
    def fail() -> None:
        raise error

    with nullcontext() if memory else pytest.raises(RuntimeError, match="a bug"):
        assert within_memory(fail) is None


def test_checkpoints_find_their_parents_by_digest(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("other", "parent", "child")]
    for path, phase in zip(paths[:2], (0, 1), strict=True):
        publish(path, mini_codec(phase), Lineage(name="parent"))
    publish(paths[2], mini_codec(2), Lineage(name="child", inputs={"parent": read_digest(paths[1])}))
    found = contenders.of_checkpoints(paths)
    assert [contender.name for contender in found] == ["other", "parent", "child"]  # two have the same stage's name
    assert [contender.parent for contender in found] == [None, None, found[1].config]
    ours, theirs = found[2].codec("cpu").state_dict(), load_codec(paths[2]).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ComparisonError, match="given twice"):
        contenders.of_checkpoints([paths[0], paths[0]])


def test_a_recipe_gives_each_codec_once() -> None:
    config = mini_codec(1).config  # A codec like its parent has no frozen step.
    assert Contender("control1", config, parent=config).activities == ("encode", "decode", "unfrozen")
    found = contenders.of_recipe(load_recipe("evidence"))
    names = [contender.name for contender in found]
    assert names[0] == "baseline"
    assert {"phase1", "phase4"} <= set(names)
    assert not any(name.startswith("control") for name in names)
    by_name = {contender.name: contender for contender in found}
    assert by_name["phase2"].parent == by_name["phase1"].config
    larger = contenders.of_recipe(load_recipe("evidence", ["model.preset=base"]))
    assert [contender.name for contender in larger] == names
    assert larger[0].config == preset_config("base")


def test_the_command_writes_a_folder_that_the_report_reads(runs: Path, tmp_path: Path, hpcm: Hpcm) -> None:
    path = tmp_path / "baseline.safetensors"
    publish(path, mini_codec(0), Lineage(name="baseline"))
    sizes = ["--size", "64x64", "--train-size", "64x64", "--rounds", "1", "--no-memory"]
    shown = json.loads(hpcm("compare", path, *sizes, "--runs", runs, "--json").out)
    folder = runs / "comparisons" / "checkpoints-1"
    assert {path.name for path in folder.iterdir()} == {"comparison.json", "comparison.png"}
    (kept,) = read_comparisons(runs)
    assert kept.trained
    assert shown["codecs"][0]["codec"] == "baseline"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--size", "512"), 2, "HEIGHTxWIDTH"),
        (("--set", "model.preset=huge"), 1, "huge"),
        (("--device", "cuda"), 2, "no CUDA device"),
        (("--preset=tiny", "lean"), 2, "not both"),
        (("--set=seed=1", "lean"), 2, "not both"),
        (("--device", "xpu"), 2, "give cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_measured_is_named(
    arguments: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch, hpcm: Hpcm
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in hpcm("compare", *arguments, code=code).err
