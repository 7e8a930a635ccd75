"""Images of the wrong type, shape or range are refused."""

import re

import fuzz_bitstream
import numpy as np
import pytest
import torch

from modules import HPCM
from modules.image_codec import ImageCodec


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return fuzz_bitstream.mini_codec()


RIGHT = torch.rand(1, 3, 8, 8)
WRONG = [
    (RIGHT.numpy(), TypeError, "images should be a tensor (B, 3, H, W) with values in [0, 1], not ndarray"),
    ((255 * RIGHT).byte(), TypeError, "images are torch.uint8: convert them to values in [0, 1] with images.float()"),
    (RIGHT.double(), TypeError, "images are torch.float64, the codec's weights torch.float32: convert them with"),
    (RIGHT[0], ValueError, "images of shape (3, 8, 8) lack the batch dimension: give images[None]"),
    (RIGHT[:, :1], ValueError, "images should have the shape (B, 3, H, W), not (1, 1, 8, 8)"),
    (RIGHT.movedim(1, 3), ValueError, "not (1, 8, 8, 3): move the channels to the second place"),
    (RIGHT[:, :, :0], ValueError, "images of shape (1, 3, 0, 8) have no pixels"),
    (255 * RIGHT, ValueError, "they should be in [0, 1]; divide 8-bit values by 255"),
    (2 * RIGHT - 1, ValueError, "they should be in [0, 1]; undo the normalization"),
]  # fmt: skip


@pytest.mark.parametrize(("images", "kind", "message"), WRONG)
def test_images_in_the_wrong_form_are_refused(
    codec: ImageCodec, images: torch.Tensor | np.ndarray, kind: type[Exception], message: str
) -> None:
    for use in (codec.encode, codec.model.compress, codec.model, lambda x: codec.model(x, training=True)):
        with pytest.raises(kind, match=re.escape(message)):
            use(images)


def test_images_in_the_right_form_are_coded(codec: ImageCodec) -> None:
    overshoot = RIGHT * 1.1 - 0.05  # as after resampling
    assert codec.encode(overshoot).height == 8
    with pytest.raises(ValueError, match="a file holds one image, not 2"):
        codec.encode(torch.cat((RIGHT, RIGHT)))
    with torch.autocast("cpu", torch.bfloat16):
        assert codec.model(RIGHT.bfloat16())["x_hat"].shape == RIGHT.shape


def test_values_on_other_devices_are_not_read(codec: ImageCodec) -> None:
    """A meta tensor has no values to check, and a training step must not wait for the values of a GPU."""
    sketch = HPCM.on_meta(codec.model.config)
    assert sketch(torch.empty(2, 3, 8, 8, device="meta"), training=True)["x_hat"].shape == (2, 3, 8, 8)
