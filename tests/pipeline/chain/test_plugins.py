"""A component of the user's own in a recipe's folder, in an installed package, or in HPCM_PLUGINS."""

import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from mini import FOLDER

from modules import HPCMConfig, plugins
from modules.context import components
from modules.context.components import kind_names
from pipeline.chain.chain import Chain
from pipeline.chain.stage_codec import codec_config
from pipeline.commands.chain_tables import plan_table
from pipeline.common.fresh_process import in_fresh_process
from pipeline.recipes.loading import RecipeError, load_recipe

GUIDE = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
CODE, PLUGINS, STAGE = (re.findall(rf"```{form}\n(.*?)```", GUIDE, re.DOTALL) for form in ("python", "yaml", "yaml"))


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
        ("pooling.py", "from torch", "1 / 0\nfrom torch", r"'pooling' cannot be imported: ZeroDivisionError"),
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
        monkeypatch.setenv(plugins.VARIABLE, str(recipe / "pooling.py"))
    else:
        monkeypatch.syspath_prepend(recipe)
        point = EntryPoint("pooling", "pooling", plugins.GROUP)
        monkeypatch.setattr(plugins.metadata, "entry_points", lambda group: [point])
    assert HPCMConfig(attn_s1="pooling").attn_s1.name == "pooling"  # type: ignore[arg-type]
