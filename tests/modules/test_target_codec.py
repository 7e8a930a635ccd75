"""Coding to a target: the file has the size or the PSNR that was asked for, or an error says what can be reached."""

import math

import pytest
import torch
from mini import with_rates
from skimage.data import coffee
from torch import Tensor

from modules import target_codec
from modules.image_codec import ImageCodec
from modules.target_codec import Target, TargetCodec, TargetError
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.shipped import qualities


@pytest.fixture(scope="module")
def bundled() -> list[ImageCodec]:
    return [ImageCodec(load_codec(path), effort=1) for _, path in qualities()]


@pytest.mark.parametrize("wanted", [600, 950])
def test_a_file_has_at_most_the_bytes_that_are_asked_for_and_nearly_as_many(
    wanted: int, bundled: list[ImageCodec], photo: Tensor
) -> None:
    coded = TargetCodec(bundled, Target("bytes", wanted)).encode(photo, icc_profile=bytes(50))
    assert coded.icc_profile == bytes(50)
    assert 0.99 * wanted <= len(coded.pack()) <= wanted


def test_two_latents_are_blended_if_no_refinement_meets_the_target(
    bundled: list[ImageCodec], photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_codec, "_REFINEMENTS", 1)
    plain = len(ImageCodec(bundled[0].model).encode(photo).pack())
    coded = TargetCodec(bundled[:1], Target("bits per pixel", 0.97 * 8 * plain / 128**2)).encode(photo)
    assert 0.96 * plain <= len(coded.pack()) <= 0.97 * plain


def test_the_nearest_file_is_written_with_a_note_if_the_search_ends_before(
    bundled: list[ImageCodec], photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_codec, "_REFINEMENTS", 0)
    small, large = (len(ImageCodec(codec.model).encode(photo).pack()) for codec in (bundled[0], bundled[-1]))
    notes = list[str]()
    coded = TargetCodec([bundled[0], bundled[-1]], Target("bytes", large - 50), notes.append).encode(photo)
    assert len(coded.pack()) == small
    assert notes == [f"{small} bytes, the nearest to {large - 50} bytes that was found"]


def test_an_image_has_at_least_the_psnr_that_is_asked_for(bundled: list[ImageCodec], photo: Tensor) -> None:
    codec = TargetCodec(bundled, Target("dB", 29.0))
    x_hat = (codec.decode(codec.encode(photo)).x_hat * 255).round() / 255
    assert 29.0 <= -10 * math.log10(float((x_hat - photo).square().mean())) <= 29.021


def test_the_quality_of_a_codec_of_several_rates_moves_without_refinement(bundled: list[ImageCodec]) -> None:
    photo = torch.from_numpy(coffee()[:256, :384].copy()).permute(2, 0, 1)[None] / 255
    model = with_rates(bundled[2].model, [0.0018, 0.013, 0.0483])
    for wanted in (2500, 4000):
        coded = TargetCodec([ImageCodec(model)], Target("bytes", wanted)).encode(photo)
        assert 0.99 * wanted <= len(coded.pack()) <= wanted
    with pytest.raises(TargetError, match="100 bytes cannot be reached"):
        TargetCodec([ImageCodec(model)], Target("bytes", 100)).encode(photo)


@pytest.mark.parametrize("target", [Target("bytes", 100), Target("dB", 60.0)])
def test_an_error_names_the_range_that_can_be_reached(target: Target, bundled: list[ImageCodec], photo: Tensor) -> None:
    with pytest.raises(TargetError, match=r"cannot be reached: [\d.]+ to [\d.]+ were"):
        TargetCodec(bundled, target).encode(photo)


def test_a_target_needs_an_effort(bundled: list[ImageCodec]) -> None:
    with pytest.raises(ValueError, match="a target needs an effort from 1 to 4"):
        TargetCodec([ImageCodec(bundled[0].model)], Target("bytes", 1000))


def test_a_search_that_is_stopped_codes_nothing(bundled: list[ImageCodec], photo: Tensor) -> None:
    codec = ImageCodec(bundled[0].model, effort=1, go_on=lambda iteration, _: iteration < 2)
    with pytest.raises(TargetError, match="stopped before a file met the target"):
        TargetCodec([codec], Target("bytes", 400)).encode(photo)
