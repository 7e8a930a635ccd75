"""CompressAI is imported in part, and the rest of it works when it is used."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.compressai_parts import import_on_demand

CODEC = """
import sys

from modules import HPCM, PRESETS, preset_config

for preset in PRESETS:
    for phase in range(5):
        HPCM.on_meta(preset_config(preset, phase))
heavy = {"torch_geometric", "torch._dynamo", "sympy", "pandas", "matplotlib", "torchvision", "scipy.stats._stats_py"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()

import compressai

assert compressai.zoo.image_models
assert compressai.__version__
import compressai.datasets
from compressai.models import CompressionModel
from compressai.registry import MODELS, TRANSFORMS, register_model

assert compressai.datasets.ImageFolder
assert MODELS["hpcm"] is HPCM and issubclass(HPCM, CompressionModel)
assert {"ToTensor", "NormalizeScale"} <= TRANSFORMS.keys()
assert register_model is compressai.registry.torch.register_model
assert compressai.entropy_models.GaussianConditional._standardized_quantile(0.5) == 0
"""


def test_a_codec_imports_no_package_that_it_does_not_use_and_the_rest_of_compressai_works() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", CODEC], check=True, cwd=Path(__file__).parents[2])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The `__init__.py` of a package `asked_later`, which has a submodule `part`."""
    (tmp_path / "asked_later").mkdir()
    (tmp_path / "asked_later" / "part.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "asked_later" / "__init__.py"
    for name in ("asked_later", "asked_later.part"):
        sys.modules.pop(name, None)


def test_a_package_runs_once_when_a_name_is_asked_of_it(package: Path) -> None:
    package.write_text("print('runs')\nfrom asked_later.part import value\nfrom . import part\nother = value + 1\n")
    module = import_on_demand("asked_later")
    from asked_later.part import value

    assert value == 3
    assert "other" not in vars(module)
    assert import_on_demand("asked_later") is module
    from asked_later import other

    assert (other, module.part.value) == (4, 3)
    with pytest.raises(AttributeError, match="module 'asked_later' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_package_that_fails_says_so_each_time(package: Path) -> None:
    package.write_text("import a_package_that_nobody_has\n")
    module = import_on_demand("asked_later")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
            _ = module.anything
