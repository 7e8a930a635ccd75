import pytest
import torch
from fuzz_bitstream import mini_codec

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
