"""λ and metric of a chain follow from the file of its root, or are asked for."""

import shutil
from pathlib import Path

import pytest
import torch
from mini import FOLDER, Hpcm, mini_codec, run_chain
from official_files import FORMS, published
from PIL import Image

from modules import HPCM
from pipeline.chain.chain import Chain
from pipeline.chain.plan import ChainError
from pipeline.chain.precheck import check_stages
from pipeline.chain.stage_codec import StageError, load_fitting
from pipeline.commands.chain_options import ChainOptions
from pipeline.commands.chain_tables import plan_table
from pipeline.common.packaged import STAGES, WEIGHTS
from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage
from pipeline.weights.trained_for import by_name

LARGE_CROPS = "data.crop=256"
"""MS-SSIM needs larger crops than the mini recipe has."""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.013.pth.tar", (0.013, "mse")),
        ("HPCM_Base_mse_0.0018.pth.tar", (0.0018, "mse")),
        ("HPCM-Large_0.0483_2750.pth.tar", (0.0483, "mse")),
        ("lambda0.0067.pth", (0.0067, "mse")),
        ("HPCM_Base_ms-ssim_16.64.pth.tar", (16.64, "ms-ssim")),
        ("60.5.pth.tar", (60.5, "ms-ssim")),
        ("torch2.4_mse_0.013.pth.tar", (0.013, "mse")),
        ("torch2.4_0.013.pth.tar", None),
        ("0.0035_or_0.0067.pth.tar", None),
        ("v1.0.013.pth.tar", None),
        ("10.013.pth.tar", None),
        ("checkpoint_best.pth.tar", None),
        ("msssim_0.013.pth.tar", None),
    ],
)
def test_an_official_lmbda_in_a_name_is_found(name: str, expected: tuple[float, str] | None) -> None:
    found = by_name(name)
    assert (found and found[:2]) == expected


def chain_from(file: Path, *settings: str, start: bool = False) -> Chain:
    files = {"start" if start else "baseline": file}
    return ChainOptions(str(FOLDER), settings=list(settings), runs=file.parent / "runs", **files).chain("phase1")


def loss_of(chain: Chain) -> list[tuple[float, str]]:
    return [(task.stage.lmbda, task.stage.metric) for task in chain.tasks]


def empty(path: Path) -> Path:
    path.touch()
    return path


def test_a_baselines_name_gives_lmbda_and_metric(tmp_path: Path) -> None:
    chain = chain_from(empty(tmp_path / "0.0035.pth.tar"))
    assert loss_of(chain) == [(0.0035, "mse")] * 2
    assert plan_table(chain, []).title.startswith("mini, λ = 0.0035 for mse, by the name of 0.0035.pth.tar, in ")
    chain = chain_from(empty(tmp_path / "HPCM_Base_ms-ssim_2.4.pth.tar"), LARGE_CROPS)
    assert loss_of(chain) == [(2.4, "ms-ssim")] * 2


@pytest.mark.parametrize(("recipe", "preset"), [("base", "base"), ("large", "large"), ("base", "phi-context")])
def test_every_published_kind_is_planned_for_both_metrics(recipe: str, preset: str, tmp_path: Path) -> None:
    settings = [f"model.preset={preset}"]
    for name, loss in (("mse_0.0483", (0.0483, "mse")), ("ms-ssim_60.5", (60.5, "ms-ssim"))):
        file = empty(tmp_path / f"HPCM_{preset}_{name}.pth.tar")
        chain = ChainOptions(recipe, settings=settings, runs=tmp_path / "runs", baseline=file).chain("phase4")
        assert loss_of(chain) == [loss] * 5
        check_stages(chain.tasks)
    tuned = ChainOptions("ms-ssim", settings=["lmbda=2.4", *settings], runs=tmp_path / "runs", start=file)
    check_stages(tuned.chain("tuned").tasks)


def test_the_lineage_of_a_baseline_gives_them(tmp_path: Path) -> None:
    for lineage in (Lineage(stage="{lmbda: 0.02, metric: mse}"), Lineage(imported_from="0.0067.pth.tar")):
        path = tmp_path / "baseline.safetensors"
        publish(path, mini_codec(0), lineage)
        assert loss_of(chain_from(path))[0][0] == (0.02 if lineage.stage else 0.0067)


def test_an_unknown_lmbda_must_be_given(tmp_path: Path) -> None:
    file = empty(tmp_path / "best.pth.tar")
    for start in (False, True):
        with pytest.raises(ChainError) as caught:
            chain_from(file, start=start)
        assert "Give it with --lmbda" in str(caught.value)
        assert "0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483 for mse" in str(caught.value)
        assert loss_of(chain_from(file, "lmbda=0.02", start=start)) == [(0.02, "mse")] * 2


def test_a_start_may_have_had_another_loss(tmp_path: Path) -> None:
    file = empty(tmp_path / "0.013.pth.tar")
    assert loss_of(chain_from(file, start=True)) == [(0.013, "mse")] * 2
    assert chain_from(file, "lmbda=0.02", start=True).doubt == ""
    with pytest.raises(
        ChainError, match=r"for which λ of ms-ssim(.|\n)*2.4, 4.58, 8.73, 16.64, 31.73, 60.5 for ms-ssim"
    ):
        chain_from(file, "metric=ms-ssim", LARGE_CROPS, start=True)
    chain = chain_from(file, "metric=ms-ssim", "lmbda=8.73", LARGE_CROPS, start=True)
    assert loss_of(chain) == [(8.73, "ms-ssim")] * 2


def test_a_contradiction_is_asked_before_anything_is_imported(tmp_path: Path, hpcm: Hpcm) -> None:
    file, runs = empty(tmp_path / "0.0035.pth.tar"), tmp_path / "runs"
    options = "baseline", "--recipe", FOLDER, "--runs", runs, "--baseline", file, "--lmbda", 0.013
    said = "0.0035.pth.tar has λ = 0.0035 for mse, by the name of 0.0035.pth.tar, but this chain has λ = 0.013 for mse"
    assert said in hpcm("plan", *options).out
    assert said in hpcm("run", *options, code=1).out
    assert not list(runs.glob("mini/*/baseline"))


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A file of the codec `tiny` in the form of the published checkpoints."""
    path = tmp_path / "HPCM_tiny_mse_0.0035.pth.tar"
    torch.save(published(HPCM.from_preset("tiny").state_dict()), path, **FORMS["legacy"])
    return path


def test_the_lineage_of_a_chains_root_tells_of_the_ones(tiny_file: Path, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "val" / "image.png")
    settings = ["baseline.schedule.scratch.steps=0", "baseline.schedule.scratch.warmup=0"]
    for start in (False, True):
        options = {"start" if start else "baseline": tiny_file, "settings": settings, "val": str(tmp_path / "val")}
        chain = ChainOptions("tiny", runs=runs / str(start), **options).chain("baseline")
        run_chain(chain)
        lineage = Lineage.read(chain.tasks[0].checkpoint)
        assert (lineage.imported_from, lineage.filled_with_ones) == (tiny_file.name, "adaptive_params_list")
        assert "lmbda: 0.0035" in (lineage.stage or "")


def test_a_file_of_another_preset_names_it(tiny_file: Path, runs: Path) -> None:
    chain = ChainOptions("base", runs=runs, baseline=tiny_file).chain("baseline")
    with pytest.raises(StageError, match=r"matches the file, such as with --set model\.preset=tiny"):
        load_fitting(chain.tasks[0], tiny_file)


def test_a_named_variant_has_a_folder_of_its_own(tmp_path: Path) -> None:
    chain = ChainOptions(str(FOLDER), runs=tmp_path, name="wide").chain("phase1")
    assert (chain.recipe, chain.folder) == ("mini-wide", tmp_path / "mini-wide" / "lmbda-0.013")
    with pytest.raises(ChainError, match=r"--name \.\./other: give letters"):
        ChainOptions(str(FOLDER), runs=tmp_path, name="../other").chain("phase1")


def test_a_copied_recipe_finds_its_bundled_weights_and_a_wrong_name_is_located(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(STAGES / "tiny", mine)
    assert ChainOptions(str(mine)).chain("baseline").tasks[0].imported == WEIGHTS / "baseline.safetensors"
    with pytest.raises(ChainError, match=r"--set baseline.weights=base: weights: .*mine/base; .* control-0.013,"):
        ChainOptions(str(mine), settings=["baseline.weights=base"]).chain("baseline")
