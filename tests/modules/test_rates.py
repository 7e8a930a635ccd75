"""A codec of several rates: it starts as its parent, its files store the quality, and qualities are real numbers."""

import itertools

import pytest
import torch
from float_configurations import CONFIGURATIONS
from mini import with_rates
from torch import Tensor

from modules import HPCM, HPCMConfig
from modules.bitstream.file_format import BitstreamError
from modules.context.rates import Rate
from modules.image_codec import ImageCodec
from modules.network import Noise
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.published import Lineage
from pipeline.weights.shipped import codec_file

RATES = (0.0018, 0.0067, 0.013, 0.0483)


@pytest.fixture(scope="module")
def parent() -> HPCM:
    """The bundled control of λ = 0.013."""
    return load_codec("control-0.013")


@pytest.fixture(scope="module")
def child(parent: HPCM) -> HPCM:
    """A codec of four rates with the parent's weights. Tests must not change it."""
    return with_rates(parent, RATES)


def size(coded: dict[str, list[list[bytes]]]) -> int:
    return sum(len(string) for strings in coded["strings"] for string in strings)


def test_at_the_parents_lambda_the_child_codes_what_the_parent_codes(parent: HPCM, child: HPCM, photo: Tensor) -> None:
    (ours_y,), (ours_z,) = child.compress(photo, quality=3)["strings"]
    (y,), (z,) = parent.compress(photo)["strings"]
    assert (ours_y, ours_z[2:]) == (y, z)


def test_bytes_and_psnr_rise_with_quality_in_steps_of_a_quarter(child: HPCM, photo: Tensor) -> None:
    coded = [child.compress(photo, quality=1 + step / 4) for step in range(13)]
    errors = [float((child.decompress(**one)["x_hat"] - photo).square().mean()) for one in coded]
    assert all(low < high for low, high in itertools.pairwise(map(size, coded)))
    assert all(low > high for low, high in itertools.pairwise(errors))


def test_decoding_gives_the_reconstruction_of_the_stored_quality(child: HPCM, photo: Tensor) -> None:
    coded = child.compress(photo, quality=1.7)
    with torch.no_grad(), child.at_quality(round(1.7 * 1024) / 1024):
        expected = child(photo, training=False)["x_hat"].clamp(0, 1)
    torch.testing.assert_close(child.decompress(**coded)["x_hat"], expected)
    assert child.quality == 2.5


@pytest.mark.parametrize("name", ["no oneDNN", "channels first", "float64"])
def test_a_file_decodes_under_other_floating_point_configurations(
    name: str, parent: HPCM, child: HPCM, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    other, coded = with_rates(parent, RATES), child.compress(photo, quality=1.3)
    CONFIGURATIONS[name].prepare(other)
    decoded = other.decompress(**coded)
    assert decoded["recovery"] == [""]
    assert ((decoded["x_hat"] - child.decompress(**coded)["x_hat"]) * 255).abs().max() < 0.5


def test_a_damaged_quality_is_found(child: HPCM, photo: Tensor) -> None:
    (y,), (z,) = child.compress(photo, quality=2)["strings"]
    for head in (b"", b"\0\0", b"\xff\xff"):
        with pytest.raises(BitstreamError, match=r"damaged: quality .* of a codec with qualities from 1 to 4"):
            child.decompress([[y], [head + z[2:] if head else b""]], photo.shape[2:])
    with pytest.raises(BitstreamError, match="step"):
        child.decompress([[y], [b"\0\x0c" + z[2:]]], photo.shape[2:])


def test_each_sample_of_a_batch_has_its_own_quality(child: HPCM, photo: Tensor) -> None:
    batch, qualities = photo[:, :, :64, :64].repeat(2, 1, 1, 1), torch.tensor([1.0, 3.6])
    with torch.no_grad():
        with child.at_quality(qualities):
            together = child(batch, training=False)
        for number, quality in enumerate(qualities.tolist()):
            with child.at_quality(quality):
                alone = child(batch[:1], training=False)
            for name in ("x_hat", "scales"):
                torch.testing.assert_close(together[name][number], alone[name][0])


def test_refinement_lowers_the_loss_of_the_quality_at_which_it_codes(child: HPCM, photo: Tensor) -> None:
    losses = []
    for effort in (0, 2):
        coded = child.compress(photo, effort=effort, quality=1.5)
        mse = (child.decompress(**coded)["x_hat"] - photo).square().mean()
        losses.append(8 * size(coded) / photo[0, 0].numel() + (0.0018 * 0.0067) ** 0.5 * 255**2 * float(mse))
    assert losses[1] < 0.99 * losses[0]


def test_training_reaches_the_vectors_of_neighboring_rates_alone(parent: HPCM, photo: Tensor) -> None:
    model = with_rates(parent, RATES).train()
    (_, m, h, w), n = (1, *model.latent_shapes(128, 128)[0]), model.config.N
    noise = Noise(torch.zeros(1, m, h, w), torch.zeros(1, n, h // 4, w // 4), torch.zeros(1))
    with model.at_quality(2.5):
        coded = model(photo, noise=noise)
    (sum(-p.log2().sum() for p in coded["likelihoods"].values()) + coded["x_hat"].square().sum()).backward()
    for vectors in model.rate_vectors.parameters():
        moved = vectors.grad.flatten(1).abs().sum(1) > 0
        assert moved.tolist() == [False, True, True, False]


def test_vectors_and_lambda_are_interpolated_geometrically(child: HPCM) -> None:
    vectors = child.rate_vectors
    low, middle, high = (Rate(vectors, torch.tensor([quality])).gain for quality in (2.0, 2.5, 3.0))
    torch.testing.assert_close(middle, (low * high).sqrt())
    for quality in (1.0, 1.25, 2.0, 3.9, 4.0):
        lmbda = float(Rate(vectors, torch.tensor([quality])).lmbda)
        assert vectors.quality_of(min(max(lmbda, RATES[0]), RATES[-1])) == pytest.approx(quality, abs=1e-6)
    with pytest.raises(ValueError, match=r"λ = 0.05: the codec has rates from λ = 0.0018 to 0.0483"):
        vectors.quality_of(0.05)


def test_codecs_of_one_rate_are_as_before(parent: HPCM, photo: Tensor) -> None:
    assert "rates" not in parent.config.to_dict()
    assert not any("rate_vectors" in name for name in parent.state_dict())
    assert ImageCodec(parent).identity.hex() == Lineage.read(codec_file("control-0.013")).identity
    with pytest.raises(ValueError, match="quality 2: this codec has one rate"):
        parent.compress(photo, quality=2)


def test_a_configuration_with_rates_survives_its_files() -> None:
    config = HPCMConfig(rates=RATES)
    assert HPCMConfig.from_dict(config.to_dict()) == config
    for rates in ([0.01], [0.02, 0.01], [0.0, 0.01], [0.01] * 64):
        with pytest.raises(ValueError, match="positive λ in ascending order"):
            HPCMConfig(rates=rates)  # type: ignore[arg-type]
