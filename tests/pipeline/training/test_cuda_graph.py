"""A training step replayed as a CUDA graph."""

import pytest
import torch
from torch import Tensor

from modules import HPCM, Noise
from pipeline.training.cuda_graph import GraphedGradients, GraphError
from pipeline.training.objectives import RateDistortion, training_noise


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
