"""A training step replayed as a CUDA graph."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from mini import Notes, history, interrupt, mini_chain, mini_codec, mini_stage, run_chain, with_rates
from torch import Tensor
from torch.profiler import profile

from modules import HPCM, Noise
from modules.context.coding_order import hierarchy
from pipeline.chain.chain import Chain
from pipeline.training.cuda_graph import GraphedGradients, GraphError
from pipeline.training.gradients import reason_against_graph
from pipeline.training.objectives import Handover, RateDistortion, build_objective, training_noise
from pipeline.training.transfer import Migration

WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"}
"""Operators for which the processor waits for the GPU, or the GPU for a tensor from the processor."""


def waits(child: HPCM, parent: HPCM, objective: str, metric: str = "mse", side: int = 128) -> set[str]:
    """The operators of a training step with handover and checkpointing that no CUDA graph can hold."""
    migration = Migration(child, parent, frozenset())
    loss = build_objective(objective, migration, mini_stage("baseline").model_copy(update={"metric": metric}))
    child.train().set_gradient_checkpointing(True)
    images, noise = torch.rand(2, 3, side, side), training_noise(child, (side, side), 0, [0, 1])
    handover = Handover(child, parent, migration.components)
    hierarchy(side // 16, side // 16, images.device)  # is kept
    with profile() as found:
        loss(images, noise)["loss"].backward()
    handover.end()
    return WAITS & {event.name for event in found.events()}


def test_a_step_waits_for_the_gpu_only_with_ms_ssim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.network.check_range", lambda images: None)  # On a GPU training does not call it.
    parent, child = mini_codec(0), mini_codec(1)
    for objective in ("align", "rate-distortion"):
        assert waits(child, parent, objective) == set(), objective
    assert waits(with_rates(parent, [0.004, 0.013, 0.04]), parent, "rate-distortion") == set()
    assert "aten::item" in waits(parent, parent, "rate-distortion", "ms-ssim", 192)


def test_the_reason_why_a_stage_has_no_graph_is_named() -> None:
    stage = mini_stage("baseline")
    assert reason_against_graph(stage) == ""
    assert "ms-ssim" in reason_against_graph(stage.model_copy(update={"metric": "ms-ssim"}))
    assert "torch.compile" in reason_against_graph(stage.model_copy(update={"compile": True}))


@pytest.fixture
def _gpu() -> Iterator[None]:
    """Let Accelerate choose its device again, before and after a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class ManySizes(Notes):
    """After each step, codes as many sizes as the cache of coding orders holds."""

    def step(self, values: dict[str, float] | None) -> None:
        for n in range(1, 17):
            hierarchy(8 * n, 8, torch.device("cuda", 0))


def assert_same_training(chain: Chain, reference: Chain) -> None:
    """Compare all steps and losses. A GPU adds up in any order, and a latent may then be rounded to the next symbol."""
    for task, other in zip(chain.tasks, reference.tasks, strict=True):
        found, expected = history(task.folder), history(other.folder)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert [step for step, _ in found[name]] == [step for step, _ in values]
            if name.endswith("/loss"):
                assert dict(found[name]) == pytest.approx(dict(values), rel=0.02), name


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("phase4", []),
        ("phase1", ["precision=bf16", "gradient_checkpointing=true"]),
        ("phase1", ["data.accumulate=2"]),
        ("variable", []),
    ],
    ids=["every phase", "bf16 and checkpointing", "micro-batches", "several rates"],
)
def test_a_chain_in_graphs_trains_as_with_single_launches(stage: str, settings: Sequence[str], tmp_path: Path) -> None:
    chains = []
    for graph in ("true", "false"):
        chains.append(mini_chain(tmp_path / graph, stage, ["log_every=1", f"cuda_graph={graph}", *settings]))
        run_chain(chains[-1], ManySizes(), cpu=False)
    assert_same_training(*chains)


@pytest.mark.gpu
@pytest.mark.usefixtures("_gpu")
def test_a_chain_in_graphs_that_is_interrupted_trains_as_one_that_is_not(tmp_path: Path) -> None:
    settings = ["log_every=1", "cuda_graph=true"]
    whole, stopped = (mini_chain(tmp_path / name, "phase1", settings) for name in ("whole", "stopped"))
    run_chain(whole, cpu=False)
    for segment, step in (("align", 1), ("frozen", 3), ("unfrozen", 2)):
        interrupt(stopped, segment, step, cpu=False)
    run_chain(stopped, cpu=False)
    assert_same_training(stopped, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", [0, 4])
def test_a_graph_gives_the_values_and_gradients_of_single_launches(phase: int) -> None:
    torch.manual_seed(0)
    model = HPCM.from_preset("tiny", phase).cuda().train()
    objective = RateDistortion(model, 0.013, "mse")
    parameters = list(model.parameters())

    def compute(images: Tensor, noise: Noise) -> dict[str, Tensor]:
        values = objective(images, noise)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}

    def batch(seed: int) -> tuple[Tensor, Noise]:
        noise = training_noise(model, (128, 128), seed, range(4))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(4, 3, 128, 128, generator=generator).cuda(), Noise(*(tensor.cuda() for tensor in noise))

    def gradients() -> list[Tensor]:
        taken = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters]
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()
        return taken

    expected = []
    for seed in (1, 2):
        values = compute(*batch(seed))
        expected.append((values, gradients()))
    graphed = GraphedGradients(compute, parameters)
    for seed, (values, wanted) in zip((1, 2), expected, strict=True):  # The second call has other inputs.
        torch.testing.assert_close(graphed(*batch(seed)), values, rtol=1e-4, atol=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in wanted)
        for found, gradient in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-2, atol=1e-4 * scale)
    graphed(*batch(1))
    graphed(*batch(1))  # Gradients add up over micro-batches.
    for found, gradient in zip(gradients(), expected[0][1], strict=True):
        torch.testing.assert_close(found, 2 * gradient, rtol=1e-2, atol=2e-4 * scale)


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_reported() -> None:
    weight = torch.ones(1, requires_grad=True, device="cuda")

    def compute(images: Tensor, noise: Noise) -> dict[str, Tensor]:
        loss = (weight * images).sum()
        loss.backward()
        return {"loss": loss.detach() * loss.item()}

    images = torch.ones(2, device="cuda")
    with pytest.raises(GraphError, match="cuda_graph=false"):
        GraphedGradients(compute, [weight])(images, Noise(images, images))
