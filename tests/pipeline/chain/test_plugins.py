"""A component of the user's own in a recipe's folder, in an installed package, or in HPCM_PLUGINS.

The component is the example of CONTRIBUTING.md. An objective and a metric are registered here.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from mini import FOLDER, SMALL, history, interrupt, run_chain
from torch import Tensor

from modules import HPCM, HPCMConfig, Noise, plugins
from modules.context import components
from modules.context.components import kind_names
from pipeline.chain.chain import Chain
from pipeline.chain.stage_codec import codec_config
from pipeline.commands.chain_tables import plan_table
from pipeline.common.fresh_process import in_fresh_process
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Metric, register_metric
from pipeline.recipes.loading import RecipeError, load_recipe
from pipeline.recipes.registered import METRICS, OBJECTIVES, ObjectiveTraits
from pipeline.recipes.schema import Stage
from pipeline.training import objectives
from pipeline.training.objectives import Objective, register_objective
from pipeline.training.transfer import Migration
from pipeline.weights.checkpoints import load_codec, read

GUIDE = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
CODE, PLUGINS, STAGE = (re.findall(rf"```{form}\n(.*?)```", GUIDE, re.DOTALL) for form in ("python", "yaml", "yaml"))

MIGRATION = """
name: pooled
parent: baseline
model: {phase: 0, overrides: {attn_s1: {kind: pooling, width: 8}}}
transfer: {fit: true, calibration: 2}
schedule:
  - {name: align, train: new, objective: align, steps: 2, lr: {new: 1.0e-3}}
  - {name: frozen, train: new, objective: rate-only, steps: 3, handover: 2, lr: {pooling: 1.0e-3}}
  - {name: unfrozen, train: all, objective: rate-distortion, steps: 2, lr: {pooling: 1.0e-3, default: 1.0e-4}}
metric: mae
"""


class RateOfY(Objective):
    """Bits of y alone, by the number of image values."""

    def __init__(self, model: HPCM):
        super().__init__()
        self.model = model

    @classmethod
    def build(cls, migration: Migration, stage: Stage) -> "RateOfY":
        return cls(migration.child)

    def forward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        coded = self.model(images, training=True, noise=noise, reconstruct=False)
        return {"loss": -coded["likelihoods"]["y"].log2().sum() / images.numel()}


def mean_error(x_hat: Tensor, images: Tensor) -> Tensor:
    return (x_hat - images).abs().mean()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The objective `rate-only` and the metric `mae`, until the end of the test."""
    monkeypatch.setattr(objectives, "_CLASSES", dict(objectives._CLASSES))
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))
    register_objective("rate-only", ObjectiveTraits())(RateOfY)
    register_metric(Metric("mae", "MAE", lambda image, x_hat: float(mean_error(x_hat, image)), distortion=mean_error))
    yield
    del OBJECTIVES["rate-only"], METRICS["mae"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example of CONTRIBUTING.md, in a copy of the mini recipe. What it registers is gone after the test."""
    kinds = {group: dict(found) for group, found in components._KINDS.items()}
    for owner, name, value in (
        (components, "_KINDS", kinds),
        (plugins, "_loaded", {}),
        (plugins, "_registered", {}),
        (sys, "path", [*sys.path]),
    ):
        monkeypatch.setattr(owner, name, value)
    plugins.load_installed_plugins.cache_clear()
    folder = tmp_path / "mine"
    shutil.copytree(FOLDER, folder)
    with (folder / "common.yaml").open("a") as defaults:
        defaults.write(PLUGINS[0])
    (folder / "pooled.yaml").write_text(STAGE[1])
    (folder / "pooling.py").write_text(CODE[0])
    yield folder
    sys.modules.pop("pooling", None)
    plugins.load_installed_plugins.cache_clear()


def chain_of(recipe: Path) -> Chain:
    return Chain(load_recipe(recipe), "pooled", recipe.parent / "runs")


def test_a_recipe_imports_the_module_beside_it_and_the_plan_says_so(recipe: Path) -> None:
    chain = chain_of(recipe)
    config = codec_config(chain.tasks[-1])
    assert (config.attn_s3.name, config.attn_s3.to_dict()["width"]) == ("pooling", 16)
    assert f"runs the code of the plugin pooling: {recipe / 'pooling.py'}" in plan_table(chain, chain.plan()).title
    assert "pooling" in (in_fresh_process(kind_names) or ())


def test_a_changed_module_changes_the_inputs_of_the_stages_that_use_it(recipe: Path) -> None:
    before = chain_of(recipe).tasks
    (recipe / "pooling.py").write_text(f"{CODE[0]}# changed\n")
    after = chain_of(recipe).tasks
    assert before[0].inputs() == after[0].inputs()
    assert before[1].plugins.keys() == {"pooling"}
    assert before[1].plugins != after[1].plugins


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("common.yaml", "[pooling]", "[poling]", r"common.yaml:\d+: plugins: the plugin 'poling' cannot be im"),
        ("common.yaml", "[pooling]", "pooling.py", r"common.yaml:\d+: plugins: should be a list of names"),
        ("pooled.yaml", "name: pooled", "name: pooled\nplugins: [a]", r"pooled.yaml:2: plugins: belongs in"),
        ("pooled.yaml", "kind: pooling", "kind: poolin", r"pooled.yaml:3: model.overrides.attn_s3: no kind 'poolin'"),
        ("pooling.py", "from torch", "1 / 0\nfrom torch", r"ZeroDivisionError: division by zero \(.*/pooling.py:3\)"),
        ("pooling.py", "from torch", "raise SystemExit(3)\nfrom torch", r"'pooling' cannot be imported: SystemExit: 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file(file: str, old: str, new: str, message: str, recipe: Path) -> None:
    (recipe / file).write_text((recipe / file).read_text().replace(old, new))
    with pytest.raises(RecipeError, match=message):
        codec_config(chain_of(recipe).tasks[-1])


@pytest.mark.parametrize("how", ["variable", "entry point"])
def test_a_codec_of_the_users_own_kind_loads_without_a_recipe(
    how: str, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no kind 'pooling'.*in `plugins` of the recipe or in HPCM_PLUGINS"):
        HPCMConfig(attn_s1="pooling")  # type: ignore[arg-type]
    plugins.load_installed_plugins.cache_clear()
    if how == "variable":
        monkeypatch.setenv(plugins.VARIABLE, f"{recipe}/poling.py, ")
        with pytest.raises(plugins.PluginError, match=r"HPCM_PLUGINS: .*/poling.py: no such file"):
            plugins.load_installed_plugins()
        monkeypatch.setenv(plugins.VARIABLE, str(recipe / "pooling.py"))
    else:
        monkeypatch.syspath_prepend(recipe)
        point = EntryPoint("pooling", "pooling", plugins.GROUP)
        monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [point])
    assert HPCMConfig(attn_s1="pooling").attn_s1.name == "pooling"  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered")
def test_a_chain_migrates_to_a_component_of_your_own(recipe: Path, runs: Path, tmp_path: Path) -> None:
    (recipe / "pooled.yaml").write_text(MIGRATION)
    loaded = load_recipe(recipe, ["baseline.schedule.scratch.steps=2", *SMALL])
    whole, cut = (Chain(loaded, "pooled", folder) for folder in (runs, tmp_path / "cut"))
    notes = run_chain(whole)
    shutil.copytree(whole.tasks[0].folder, cut.tasks[0].folder)
    interrupt(cut, "frozen", 1)
    run_chain(cut)
    ours, theirs = (read(chain.tasks[-1].checkpoint).metadata for chain in (whole, cut))
    assert ours["digest"] == theirs["digest"]
    assert any("fitted 1 module:" in line for line in notes.lines)
    codec = load_codec(whole.tasks[-1].checkpoint)
    assert type(codec.attn_s1).__name__ == "Pooling"
    quality, logged = ours["quality"], history(whole.tasks[-1].folder)
    assert quality["rd_loss"] == pytest.approx(quality["bpp"] + 0.013 * quality["others"]["mae"])
    assert logged["final/mae"][0][1] == quality["others"]["mae"]
    assert 0 < logged["train/unfrozen/mae"][-1][1] < 1
    assert HPCMConfig.from_dict(ours["config"]) == codec.config


@pytest.mark.usefixtures("registered")
def test_unknown_names_are_refused_with_the_nearest(recipe: Path) -> None:
    (recipe / "pooled.yaml").write_text(MIGRATION.replace("rate-only", "rate-onyl"))
    with pytest.raises(RecipeError, match=r"pooled.yaml:8: schedule\[1\].objective: .*did you mean 'rate-only'"):
        load_recipe(recipe)
    with pytest.raises(ValueError, match="did you mean 'pooling'"):
        HPCMConfig(attn_s1="poolling")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind 'none' is already modules\.context\.attention\.NoAttentionKind"):
        components.register("attention", "none")(components._KINDS["attention"]["pooling"])
