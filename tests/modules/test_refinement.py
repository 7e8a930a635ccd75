"""Refinement of one image's latent: its loss falls and never rises, its files are ordinary, its memory is bounded."""

import pytest
import torch
from torch import Tensor

from modules import HPCM
from modules.image_codec import ImageCodec
from modules.refinement import Latent, Schedule, _losses, refine
from pipeline.weights.checkpoints import load_codec


@pytest.fixture(scope="module")
def trained() -> HPCM:
    """The bundled control of λ = 0.0067, alone because tests change it."""
    return load_codec("control-0.0067")


def latent_of(model: HPCM, image: Tensor) -> Latent:
    with torch.no_grad():
        y = model.g_a(model.padded(image))
        return Latent(y, model.h_a(y))


def loss_of(model: HPCM, image: Tensor, latent: Latent, lmbda: float) -> float:
    with torch.no_grad():
        return _losses(model, image, latent, lmbda)[0]


def coded_loss(model: HPCM, image: Tensor, effort: int) -> float:
    coded = model.compress(image, effort=effort)
    bits = 8 * sum(len(string) for strings in coded["strings"] for string in strings)
    mse = (model.decompress(**coded)["x_hat"] - image).square().mean()
    return bits / image[0, 0].numel() + float(model.lmbda * 255**2 * mse)  # type: ignore[operator]


def test_the_loss_of_the_file_falls_with_effort(trained: HPCM, photo: Tensor) -> None:
    plain, some, more = (coded_loss(trained, photo, effort) for effort in (0, 1, 2))
    assert more < some < 0.99 * plain


@pytest.mark.parametrize("phase", [0, 4])
@pytest.mark.parametrize("lmbda", [1e-6, 10.0])
def test_the_loss_never_rises(codecs: list[HPCM], phase: int, lmbda: float) -> None:
    model, image = codecs[phase], torch.rand(1, 3, 50, 70)
    plain = latent_of(model, image)
    refined = refine(model, image, Schedule.of(lmbda, 3), lambda *_: True, plain)
    assert loss_of(model, image, refined, lmbda) <= loss_of(model, image, plain, lmbda)


def test_a_refinement_that_ends_at_once_writes_the_plain_file(trained: HPCM, photo: Tensor) -> None:
    assert trained.compress(photo, effort=4, go_on=lambda *_: False) == trained.compress(photo)


def test_the_best_latent_so_far_is_kept_when_it_ends_early(trained: HPCM, photo: Tensor) -> None:
    plain = latent_of(trained, photo)
    stopped = refine(trained, photo, Schedule.of(0.0067, 30), lambda iteration, _: iteration < 4, plain)
    assert loss_of(trained, photo, stopped, 0.0067) < loss_of(trained, photo, plain, 0.0067)


def test_recomputed_activations_and_tiles_give_the_same_loss_and_gradients(codecs: list[HPCM]) -> None:
    model, image = codecs[4], torch.rand(1, 3, 200, 120)
    found = []
    for tile in (64, 5):  # 80 pixels: less than the image, so the second is computed in tiles
        model.g_s.tile = tile
        latent = Latent(*(tensor.requires_grad_() for tensor in latent_of(model, image)))
        loss, smooth, _ = _losses(model, image, latent, 0.01)
        found.append((torch.tensor(loss), smooth.detach(), *torch.autograd.grad(smooth, latent)))
    del model.g_s.tile
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_weights_stay_trainable_and_get_no_gradients(trained: HPCM, photo: Tensor) -> None:
    with torch.inference_mode():
        trained.compress(photo[:, :, :16, :16], effort=1)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())


def test_an_effort_that_cannot_be_made_is_refused(codecs: list[HPCM]) -> None:
    with pytest.raises(ValueError, match="effort 5: give a number from 0 to 4"):
        ImageCodec(codecs[0], effort=5)
    with pytest.raises(ValueError, match="the λ of this codec is not known"):
        codecs[0].compress(torch.rand(1, 3, 8, 8), effort=1)
