"""A codec of several rates on the command line."""

import json
from pathlib import Path

import pytest
from mini import Hpcm, with_rates
from PIL import Image
from skimage.data import coffee

from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.published import Lineage


@pytest.fixture(scope="module")
def variable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an untrained codec of two rates, with the weights of a bundled codec."""
    path = tmp_path_factory.mktemp("variable") / "variable.safetensors"
    parent = load_codec("control-0.013")
    publish(path, with_rates(parent, [0.0018, 0.013]), Lineage(name="variable"))
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(coffee()[100:228, 100:228]).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def test_a_photograph_is_coded_at_any_quality_and_decoded(variable: Path, photo: Path, hpcm: Hpcm) -> None:
    sizes = []
    for quality in (1, 1.5, 2):
        coded = photo.with_name(f"{quality}.hpcm")
        hpcm("compress", photo, "-o", coded, "-c", variable, "--quality", quality)
        hpcm("decompress", coded, "-c", variable)
        assert Image.open(coded.with_suffix(".png")).size == (128, 128)
        sizes.append(coded.stat().st_size)
    assert sizes == sorted(set(sizes))
    assert "0.0018, 0.013" in hpcm("info", variable).out
    coded = photo.with_name("refined.hpcm")
    hpcm("compress", photo, "-o", coded, "-c", variable, "--quality", 2, "--effort", 1)
    hpcm("decompress", coded, "-c", variable)


def test_evaluate_measures_every_rate(variable: Path, photo: Path, hpcm: Hpcm) -> None:
    assert "quality 2, λ = 0.013" in hpcm("evaluate", photo, "-c", variable).out
    rates = json.loads(hpcm("evaluate", photo, "-c", variable, "--json").out)["results"]["bpp"]
    assert len(rates) == 2
    assert rates[0] < rates[1]


def test_a_quality_that_the_codec_does_not_have_is_refused(variable: Path, photo: Path, hpcm: Hpcm) -> None:
    assert (
        "quality 3: this codec has qualities from 1 to 2"
        in hpcm("compress", photo, "-c", variable, "--quality", 3, code=2).err
    )
    assert "refines for the λ of its quality" in hpcm("compress", photo, "-c", variable, "--lmbda", 0.01, code=2).err
    assert "choose the quality" in hpcm("compress", photo, "--quality", 2, "--bytes", 900, code=2).err
