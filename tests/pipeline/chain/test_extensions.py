"""A component, an objective and a metric from outside the package: aligned, handed over, released, resumed."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mini import FOLDER, SMALL, Notes, Stop, history, run_chain
from torch import Tensor, nn

from modules import HPCM, HPCMConfig, Noise
from modules.context import components as registry
from modules.context.attention import CrossAttentionKind
from modules.context.components import Component, Kind, register
from modules.layers.blocks import Checkpointed, LinearLayer
from pipeline.chain.chain import Chain
from pipeline.common.errors import Interrupted
from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import Metric, register_metric
from pipeline.recipes.loading import RecipeError, load_recipe
from pipeline.recipes.registered import METRICS, OBJECTIVES, ObjectiveTraits
from pipeline.recipes.schema import Stage
from pipeline.training import objectives
from pipeline.training.objectives import Objective, register_objective
from pipeline.training.transfer import Migration
from pipeline.weights.checkpoints import load_codec, read

STAGE = """
name: pooled
parent: baseline
model: {phase: 0, overrides: {attn_s1: {kind: pooling, width: 8}}}
transfer: {fit: true, calibration: 2}
schedule:
  - {name: align, train: new, objective: align, steps: 2, lr: {new: 1.0e-3}}
  - {name: frozen, train: new, objective: rate-only, steps: 3, handover: 2, lr: {pooling: 1.0e-3}}
  - {name: unfrozen, train: all, objective: rate-distortion, steps: 2, lr: {pooling: 1.0e-3, default: 1.0e-4}}
metric: mae
gradient_checkpointing: true
"""


class PooledBlock(Checkpointed):
    """x + γ · (global mean), through `width` channels."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        self.gamma = nn.Parameter(torch.ones(1))

    def _compute(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.outer(self.inner(x).mean((2, 3), keepdim=True))


class PoolingCell(Component):
    """The next context from the prior's output and the global mean of the context."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.block, self.out = PooledBlock(channels, width), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Both (B, C, H, W); returns (B, C, H, W)."""
        return self.out(self.block(x) + self.block(h) - h)

    def start_as_identity(self) -> None:
        """Start as out(x)."""
        nn.init.zeros_(self.block.gamma)

    @property
    def last_linear(self) -> LinearLayer:
        """`out`."""
        return self.out


@dataclass(frozen=True)
class PoolingKind(Kind):
    """A global mean in place of attention."""

    width: int

    def build(self, M: int) -> PoolingCell:
        return PoolingCell(2 * M, self.width)

    def takes_over(self, predecessor: Kind) -> dict[str, str]:
        return {"conv_out": "out"} if isinstance(predecessor, CrossAttentionKind) else {}


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
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The mini recipe with a stage of its own; what it registers is gone after the test."""
    monkeypatch.setattr(registry, "_KINDS", {group: dict(kinds) for group, kinds in registry._KINDS.items()})
    monkeypatch.setattr(objectives, "_CLASSES", dict(objectives._CLASSES))
    register("attention", "pooling")(PoolingKind)
    register_objective("rate-only", ObjectiveTraits())(RateOfY)
    monkeypatch.setattr(metrics, "_METRICS", dict(metrics._METRICS))
    register_metric(Metric("mae", "MAE", lambda image, x_hat: float(mean_error(x_hat, image)), distortion=mean_error))
    folder = tmp_path / "mini"
    folder.mkdir()
    for path in FOLDER.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text())
    (folder / "pooled.yaml").write_text(STAGE)
    yield folder
    del OBJECTIVES["rate-only"], METRICS["mae"]


def chain_to(recipe: Path, runs: Path) -> Chain:
    loaded = load_recipe(recipe, ["baseline.schedule.scratch.steps=2", *SMALL])
    return Chain(loaded, "pooled", runs)


def test_a_chain_migrates_to_a_component_of_your_own(recipe: Path, runs: Path, tmp_path: Path) -> None:
    whole, cut, notes = chain_to(recipe, runs), chain_to(recipe, tmp_path / "cut"), Notes()
    run_chain(whole, notes)
    shutil.copytree(whole.tasks[0].folder, cut.tasks[0].folder)
    with pytest.raises(Interrupted):
        run_chain(cut, Stop("frozen", 1, signal.SIGTERM))
    run_chain(cut)
    ours, theirs = (read(chain.tasks[-1].checkpoint).metadata for chain in (whole, cut))
    assert ours["digest"] == theirs["digest"]
    assert any("fitted 1 module:" in line for line in notes.lines)
    codec = load_codec(whole.tasks[-1].checkpoint)
    assert isinstance(codec.attn_s1, PoolingCell)
    quality, logged = ours["quality"], history(whole.tasks[-1].folder)
    assert quality["rd_loss"] == pytest.approx(quality["bpp"] + 0.013 * quality["others"]["mae"])
    assert logged["final/mae"][0][1] == quality["others"]["mae"]
    assert 0 < logged["train/unfrozen/mae"][-1][1] < 1
    assert HPCMConfig.from_dict(ours["config"]) == codec.config


def test_unknown_names_are_refused_with_the_nearest(recipe: Path) -> None:
    (recipe / "pooled.yaml").write_text(STAGE.replace("rate-only", "rate-onyl"))
    with pytest.raises(RecipeError, match=r"pooled.yaml:8: schedule\[1\].objective: .*did you mean 'rate-only'"):
        load_recipe(recipe)
    with pytest.raises(ValueError, match="did you mean 'pooling'"):
        HPCMConfig(attn_s1="poolling")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind 'none' is already modules\.context\.attention\.NoAttentionKind"):
        register("attention", "none")(PoolingKind)
