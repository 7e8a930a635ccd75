"""Coding to a target: the file has the size or the PSNR that was asked for, or an error says what can be reached."""

import math

import pytest
import torch
from mini import with_rates
from skimage.data import coffee
from torch import Tensor

from modules import HPCM, target_codec
from modules.image_codec import ImageCodec
from modules.target_codec import Target, TargetCodec, TargetError
from pipeline.weights.checkpoints import load_codec


@pytest.fixture(scope="module")
def fixed() -> ImageCodec:
    """A codec of one rate."""
    return ImageCodec(load_codec("control-0.0018"), effort=1)


@pytest.fixture(scope="module")
def variable() -> HPCM:
    """A codec of three rates."""
    return with_rates(load_codec("control-0.013"), [0.0018, 0.013, 0.0483])


def psnr(codec: TargetCodec, image: Tensor) -> float:
    x_hat = (codec.decode(codec.encode(image)).x_hat * 255).round() / 255
    return -10 * math.log10(float((x_hat - image).square().mean()))


@pytest.mark.parametrize("effort", [0, 1])
def test_a_file_has_at_most_the_bytes_that_are_asked_for_and_nearly_as_many(effort: int, variable: HPCM) -> None:
    photo = torch.from_numpy(coffee()[100:292, 100:292].copy()).permute(2, 0, 1)[None] / 255
    wanted, codec = 2000 - 400 * effort, ImageCodec(variable, effort)
    coded = TargetCodec(codec, Target("bytes", wanted)).encode(photo, icc_profile=bytes(50))
    assert coded.icc_profile == bytes(50)
    assert 0.99 * wanted <= len(coded.pack()) <= wanted


def test_the_refinement_of_a_codec_of_one_rate_moves_the_size(fixed: ImageCodec, photo: Tensor) -> None:
    wanted = int(0.95 * len(ImageCodec(fixed.model).encode(photo).pack()))
    assert 0.99 * wanted <= len(TargetCodec(fixed, Target("bytes", wanted)).encode(photo).pack()) <= wanted


def test_two_latents_are_blended_if_no_refinement_meets_the_target(
    fixed: ImageCodec, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_codec, "_REFINEMENTS", 1)
    plain = len(ImageCodec(fixed.model).encode(photo).pack())
    coded = TargetCodec(fixed, Target("bits per pixel", 0.97 * 8 * plain / 128**2)).encode(photo)
    assert 0.96 * plain <= len(coded.pack()) <= 0.97 * plain


def test_the_nearest_file_is_written_with_a_note_if_the_search_ends_before(
    variable: HPCM, photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_codec, "_QUALITIES", 2)
    notes = list[str]()
    coded = TargetCodec(ImageCodec(variable), Target("bytes", 700), notes.append).encode(photo)
    assert len(coded.pack()) <= 700
    assert notes == [f"{len(coded.pack())} bytes, the nearest to 700 bytes that was found"]


def test_an_image_has_at_least_the_psnr_that_is_asked_for(fixed: ImageCodec, variable: HPCM, photo: Tensor) -> None:
    for codec, wanted in ((fixed, 28.7), (ImageCodec(variable), 29.0)):
        assert wanted <= psnr(TargetCodec(codec, Target("dB", wanted)), photo) <= wanted + 0.021


@pytest.mark.parametrize("target", [Target("bytes", 100), Target("dB", 60.0)])
def test_an_error_names_the_range_that_can_be_reached(
    target: Target, fixed: ImageCodec, variable: HPCM, photo: Tensor
) -> None:
    for codec in (fixed, ImageCodec(variable)):
        with pytest.raises(TargetError, match=r"cannot be reached: [\d.]+ to [\d.]+ were"):
            TargetCodec(codec, target).encode(photo)


def test_the_range_of_qualities_is_extended_by_a_refinement(variable: HPCM, photo: Tensor) -> None:
    codec = ImageCodec(variable, effort=1)
    with variable.at_quality(1):
        wanted = int(0.9 * len(ImageCodec(variable).encode(photo).pack()))
    coded = TargetCodec(codec, Target("bytes", wanted)).encode(photo)
    assert 0.99 * wanted <= len(coded.pack()) <= wanted
    codec.decode(coded)


def test_a_search_that_is_stopped_codes_nothing(fixed: ImageCodec, photo: Tensor) -> None:
    codec = ImageCodec(fixed.model, effort=1, go_on=lambda iteration, _: iteration < 2)
    with pytest.raises(TargetError, match="stopped before a file met the target"):
        TargetCodec(codec, Target("bytes", 400)).encode(photo)
