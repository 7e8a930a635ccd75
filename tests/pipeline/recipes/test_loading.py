"""Recipes: what is accepted, what is refused, and what the error messages say."""

import os
from pathlib import Path

import pytest
import yaml

from pipeline.recipes.loading import RecipeError, load_recipe
from pipeline.recipes.schema import Stage
from pipeline.recipes.yaml_source import read_text

COMMON = """\
model: {preset: tiny}
lmbda: 0.013
data: {crop: 64, batch_size: 4}
seed: 3
"""
BASELINE = """\
name: baseline
parent: null
model: {phase: 0}
schedule:
  - {name: scratch, train: all, objective: rate-distortion, steps: 9, lr: {default: 1e-3}}
"""
PHASE1 = """\
name: phase1
parent: baseline
model: {phase: 1}
transfer: {rename: {attn_s3.conv_out: attn_s3.output_proj}}
schedule:
  - {name: align, train: new, objective: align, steps: 2, lr: {new: 1.0e-3}}
  - name: frozen
    train: new
    objective: rate-distortion
    steps: 4
    handover: 2
    lr: {new: 5.0e-5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "common.yaml").write_text(COMMON)
    (tmp_path / "baseline.yaml").write_text(BASELINE)
    (tmp_path / "phase1.yaml").write_text(PHASE1)
    return tmp_path


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "base", "large", "evidence"])
def test_packaged_recipes_have_a_chain_from_baseline_to_phase_4(name: str) -> None:
    chain = load_recipe(name).chain("phase4")
    assert all(bool(stage.needs) == (name in ("base", "large")) for stage in chain)
    assert [stage.name for stage in chain] == ["baseline", "phase1", "phase2", "phase3", "phase4"]
    assert [stage.model.phase for stage in chain] == [0, 1, 2, 3, 4]
    for stage in chain[1:]:
        assert [segment.name for segment in stage.schedule][-2:] == ["frozen", "unfrozen"]
        assert stage.schedule[-2].handover > 0
        assert all(segment.decay == "cosine" for segment in stage.schedule)
        assert stage.schedule[-1].warmup > 0


def test_a_stage_overrides_the_defaults_and_set_overrides_both(folder: Path) -> None:
    (folder / "phase1.yaml").write_text(PHASE1 + "data: {crop: 128}\n")
    recipe = load_recipe(folder, ["data.batch_size=16"])
    assert recipe.stages["phase1"].data.crop == 128
    assert recipe.stages["baseline"].data.crop == 64
    assert all(stage.data.batch_size == 16 and stage.seed == 3 for stage in recipe.chain("phase1"))


def test_set_finds_list_entries_by_number_or_name_and_a_stage_by_name(folder: Path) -> None:
    overrides = ["schedule.frozen.steps=7", "baseline.schedule.0.steps=5", "phase1.seed=8"]
    recipe = load_recipe(folder, overrides)
    assert [phase.steps for phase in recipe.stages["phase1"].schedule] == [2, 7]
    assert recipe.stages["baseline"].schedule[0].steps == 5
    assert (recipe.stages["baseline"].seed, recipe.stages["phase1"].seed) == (3, 8)
    # A mapping is replaced as a whole.
    assert load_recipe(folder, ["transfer.rename={}"]).stages["phase1"].transfer.rename == {}


def test_a_chain_has_one_lambda(folder: Path) -> None:
    message = (
        f"{folder}/phase1.yaml:{len(PHASE1.splitlines()) + 1}: lmbda: should be 0.013, as in the chain's first stage "
        f"(baseline, {folder}/common.yaml:2), not 0.05; set one lmbda for all stages, in common.yaml or with "
        "--set lmbda=…"
    )
    (folder / "phase1.yaml").write_text(PHASE1 + "lmbda: 0.05\n")
    assert refusal(folder) == message
    assert load_recipe(folder, ["lmbda=0.05"]).stages["baseline"].lmbda == 0.05


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1", 1.0), ("1_000.5", 1000.5), (".5", 0.5), ("2E+1", 20.0), ("3e-05", 3e-5)]
)
def test_common_notations_of_numbers_are_read(folder: Path, text: str, value: float) -> None:
    assert load_recipe(folder, [f"lmbda={text}"]).stages["baseline"].lmbda == value


def test_words_that_yaml_1_1_converts_stay_words() -> None:
    words = "[no, yes, on, Off, 010, 1:30, 0x1f, 2024-01-01]"
    assert read_text(words, "here").plain() == tuple(words.strip("[]").split(", "))


MISTAKES = {
    "schedule.1.hand_over=3": "schedule[1].hand_over: unknown key; did you mean 'handover'?",
    "sedd=3": "sedd: unknown key; did you mean 'seed'?",
    "schedule.0.decay={att: [2], factor: 0.5}": "schedule[0].decay.att: unknown key; did you mean 'at'?",
    "phase7.seed=1": "no stage and no setting is called 'phase7'; did you mean 'phase",
    "data.zoom=3": "data.zoom: unknown key; expected one of train, val, crop, batch_size, accumulate, workers",
    "data.crop=x": '--set data.crop=x: data.crop: should be a valid integer, not "x"',
    "data.workers=100000": "data.workers: should be less than or equal to 256, not 100000",
    "data.crop=true": "data.crop: should be a valid integer, not true",
    "data.crop=64.0": "data.crop: should be a valid integer",
    "optimizer.betas=[0.9, 0.99, 0.999]": "optimizer.betas: should have at most 2 entries, not 3",
    "optimizer.betas=[0.9]": "optimizer.betas[1]: missing",
    "lmbda=.nan": "lmbda: should be a finite number",
    "lmbda=0": "lmbda: should be greater than 0, not 0",
    "seed=" + 40 * "1": "seed: should be a valid integer",
    "metric=mes": "metric: no metric \"mes\"; did you mean 'mse'?",
    "data=3": "data: should be a mapping of keys and values, not 3",
    "schedule=3": "schedule: should be a list, not 3",
    "schedule.0.lr={}": "schedule[0].lr: should have at least 1 entries, not 0",
    "schedule.0.lr.new=-1": "schedule[0].lr.new: should be greater than 0, not -1",
    "schedule.0.train=nwe": "schedule[0].train: should be 'all', 'new' or a list of name patterns",
    "schedule.0.name=a/b": "schedule[0].name: should be a word of letters, digits, - and _",
    "phase1.transfer.rename={'a.{i}': 'b.{j}'}": "transfer.rename: 'a.{i}' → 'b.{j}': {j} is not on the left",
    "phase1.transfer.rename={'a.{i}.{i}': 'b.{i}'}": "'a.{i}.{i}' → 'b.{i}': a placeholder may occur only once on",
    "phase1.transfer.rename={'a.{i}': 'b.{i.x}'}": "'a.{i}' → 'b.{i.x}': a placeholder is a word in braces, such",
    "phase1.transfer.rename={'a.{i': b}": "a placeholder is a word in braces",
    "schedule.0.decay={at: [1], factor: 2}": "schedule[0].decay.factor: should be less than 1, not 2",
    "schedule.0.decay=cosin": "decay: should be 'constant' or 'cosine', not \"cosin\"; did you mean 'cosine'?",
    "model={}": "model.preset: missing; expected here or in common.yaml",
    "phase1.schedule.1.steps=1": "phase1.yaml:11: schedule[1].handover: 2 steps are more than the segment's 1",
    "phase1.schedule.1.warmup=9": "schedule[1].warmup: 9 steps are more than the segment's 4",
    "phase1.schedule.1.decay={at: [3, 2], factor: 0.5}": "schedule[1].decay.at: the steps [3, 2] are not in ascending",
    "phase1.schedule.1.decay={at: [4], factor: 0.5}": "decay.at: step 4 is not before the end of the segment's 4 steps",
    "data.accumulate=3": "data.accumulate: a batch of 4 cannot be computed in 3 equal parts",
    "keep=best": "keep: 'best' needs validations to choose from; set validate_every",
    "phase1.schedule.1.name=align": "schedule[1].name: another segment is named 'align'",
    "phase1.schedule.0.handover=1": "schedule[0].handover: needs a parent and an objective that runs the whole codec",
    "baseline.schedule.0.handover=1": "schedule[0].handover: needs a parent",
    "phase1.schedule.0.train=all": "schedule[0].objective: 'align' needs 'train: new'",
    "baseline.schedule.0.objective=align": "schedule[0].objective: 'align' needs a parent",
    "baseline.transfer.rename={a: b}": "transfer: a stage without a parent has nothing to transfer",
    "phase1.metric=ms-ssim": "common.yaml:3: data.crop: 64 is too small: 'metric: ms-ssim' needs at least 161 pixels",
    "phase1.parent=basline": "parent: there is no stage 'basline'; did you mean 'baseline'?",
    "baseline.parent=phase1": "the parents form a cycle: baseline → phase1 → baseline",
    "phase1.name=phase2": "name: should be 'phase1', the name of the file",
    "schedule.5.steps=1": "no entry '5' in this list of 2 (align, frozen)",
    "schedule.frosen.steps=1": "did you mean 'frozen'?",
    "seed.x=1": "has no key 'x'",
    "seed": "expected key=value",
    "a..b=1": "expected key=value",
    "lmbda=[1": "expected ',' or ']'",
    "data.train=!!python/object/apply:os.system ['true']": "is not allowed",
    'data.train=""': 'data.train: should be a folder, or null for the packaged photographs, not ""',
    "data.train=&a x": "anchors and aliases",
    'data.train="\\UFFFFFFFF"': "escape is not a valid character",
}


@pytest.mark.parametrize(("override", "message"), MISTAKES.items(), ids=str)
def test_a_mistake_is_reported_with_its_key(folder: Path, override: str, message: str) -> None:
    assert message in refusal(folder, override)


def test_each_mistake_is_reported_with_its_file_and_line(folder: Path) -> None:
    (folder / "common.yaml").write_text(COMMON.replace("crop: 64", "crop: wide"))
    phase1 = PHASE1.replace("    steps: 4\n", "").replace("handover", "hand_over").replace("steps: 2", "steps: -2")
    (folder / "phase1.yaml").write_text(phase1)
    assert refusal(folder).splitlines() == [
        f'{folder}/common.yaml:3: data.crop: should be a valid integer, not "wide"',
        f"{folder}/phase1.yaml:6: schedule[0].steps: should be greater than or equal to 0, not -2",
        f"{folder}/phase1.yaml:7: schedule[1].steps: missing; expected here or in common.yaml",
        f"{folder}/phase1.yaml:10: schedule[1].hand_over: unknown key; did you mean 'handover'?",
    ]


def test_at_most_ten_mistakes_are_listed(folder: Path) -> None:
    lines = refusal(folder, *(f"wrong{i}=1" for i in range(15))).splitlines()
    assert len(lines) == 11
    assert lines[-1] == "… and 5 more"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "common.yaml: the file is empty"),
        (b"- 1\n", "common.yaml:1: expected a mapping"),
        (b"a: 1\nb: \xff\n", "common.yaml:2: not UTF-8 text"),
        (b"a: 1\n\nb: \x07\n", "common.yaml:3: control character (code 7); delete it"),
        (b"a: 1\nb:\n\tc: 2\n", "common.yaml:3: found character '\\t' that cannot start any token; indent with spaces"),
        (b"a: 1\na: 2\n", "common.yaml:2: a: written twice; first at"),
        (b"a: &x 1\nb: *x\n", "common.yaml:1: anchors and aliases"),
        (b"a: !!python/name:os.system ''\n", "common.yaml:1: the tag"),
        (b"a: 1\n1: 2\n", "common.yaml:2: a key must be text"),
        (b"a: " + 10**5 * b"[", "common.yaml:1: nested deeper than 20 levels"),
        (b"a: 1\n---\nb: 1\n", "common.yaml:2: "),
        (b"a: 1\n b: [\n", "common.yaml:2: "),
        (b"a: 1\n  b: 2\n", "common.yaml:2: mapping values are not allowed here; check the indentation"),
        (b"a:\n  b: 1\n c: 2\n", "; check the indentation: all keys of a mapping begin in the same column"),
        (b"a: 0\nmodel: {phase: 2\nb: 1\n", "; check the brackets that begin in line 2"),
        (b"a: [1, 2\nb: 1\n", "; check the brackets that begin in line 1"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "common.yaml").write_bytes(content)
    assert message in refusal(folder)


def test_a_byte_order_mark_is_accepted(folder: Path) -> None:
    plain = load_recipe(folder)
    (folder / "common.yaml").write_text(COMMON, encoding="utf-8-sig")
    assert load_recipe(folder) == plain


def test_missing_folders_files_and_stages_are_reported(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe 'tyni'; did you mean 'tiny'"):
        load_recipe("tyni")
    with pytest.raises(RecipeError, match=r"no stage 'fase1'; did you mean 'phase1'\? \(baseline, phase1\)"):
        load_recipe(folder).chain("fase1")
    (folder / "common.yaml").unlink()
    assert "common.yaml: cannot be read: No such file" in refusal(folder)
    (folder / "common.yaml").write_text(COMMON)
    (folder / "baseline.yaml").unlink()
    (folder / "phase1.yaml").unlink()
    assert "no stage here" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training", "name: 'training' is a reserved name in a chain's folder"),
        ("Superseded", "name: 'Superseded' is a reserved name in a chain's folder"),
        ("Phase1", "name: Phase1 and phase1 differ only in capitals"),
    ],
)
def test_a_stage_cannot_have_a_reserved_or_ambiguous_name(folder: Path, name: str, message: str) -> None:
    (folder / f"{name}.yaml").write_text(BASELINE.replace("baseline", name))
    assert message in refusal(folder)


def test_a_pipe_is_refused_without_waiting(folder: Path) -> None:
    (folder / "baseline.yaml").unlink()
    os.mkfifo(folder / "baseline.yaml")
    assert "baseline.yaml: not a regular file" in refusal(folder)


@pytest.mark.parametrize("name", ["mlartifacts", "MLflow.db"])
def test_a_recipe_cannot_have_a_reserved_name(name: str, folder: Path) -> None:
    taken = folder.rename(folder.parent / name)
    assert f"{name} is a reserved name in the folder of runs" in refusal(taken)


@pytest.mark.parametrize("name", ["tiny", "base", "large", "ms-ssim", "evidence"])
def test_a_resolved_stage_reads_back_as_itself(name: str) -> None:
    for stage in load_recipe(name).stages.values():
        text = stage.to_yaml()
        assert Stage.model_validate(read_text(text, "resolved").plain()) == stage
        assert yaml.safe_load(text)["name"] == stage.name


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("seed=4", False),
        ("lmbda=0.02", False),
        ("schedule.align.steps=3", False),
        ("schedule.align.lr.new=2e-3", False),
        ("transfer.initialization=design", False),
        ("model.overrides.hidden_rate=2", False),
        ("data.batch_size=8", False),
        ("lmbda=13e-3", True),
        ("phase1.schedule.frozen.lr={rwkv: 1.0e-4, new: 1.0e-3}", False),  # the first that matches is taken
        ("keep=best", False),
        ("validate_every=2", True),
        ("data.accumulate=2", True),
        ("cuda_graph=true", True),
        ("data.workers=4", True),
        ("data.train=photos", True),
        ("log_every=7", True),
        ("checkpoint_every=7", True),
        ("evaluation.images=7", True),
        ("gradient_checkpointing=true", True),
        ("accept.psnr_drop=0.5", True),
    ],
)
def test_the_digest_covers_what_influences_the_weights(folder: Path, override: str, same: bool) -> None:
    def digest(*overrides: str) -> str:
        rates = "phase1.schedule.frozen.lr={new: 1.0e-3, rwkv: 1.0e-4}"
        return load_recipe(folder, [rates, "validate_every=3", *overrides]).stages["phase1"].digest()

    plain = digest()
    assert (digest(override) == plain) is same
    (folder / "phase1.yaml").write_text(yaml.safe_dump(yaml.safe_load(PHASE1)))
    assert digest() == plain  # The order of keys does not matter.
