import pytest
import torch
from fuzz_bitstream import mini_codec
from skimage.data import coffee
from torch import Tensor

from modules import HPCM


@pytest.fixture(scope="session")
def codecs() -> list[HPCM]:
    """Small codecs of all phases, whose weights leave large residuals, many of them beyond their tables.

    Tests must not change them.
    """
    torch.manual_seed(2)
    models = []
    for phase in range(5):
        model = mini_codec(phase).model
        with torch.no_grad():
            model.g_a.branch[-1].weight *= 30
            model.h_a.branch[-1].weight *= 10
            model.scales_hyper += torch.rand_like(model.scales_hyper)
            model.means_hyper += torch.randn_like(model.means_hyper)
        model.update(force=True)
        models.append(model)
    return models


@pytest.fixture(scope="session")
def photo() -> Tensor:
    """A photograph of a cup, (1, 3, 128, 128)."""
    return torch.from_numpy(coffee()[100:228, 100:228].copy()).permute(2, 0, 1)[None] / 255
