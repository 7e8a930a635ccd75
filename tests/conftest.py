import logging
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see modules/threads.py
os.environ.pop("MLFLOW_TRACKING_URI", None)  # No test writes to a server of the user.
os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")  # Their number depends on how long a run takes.

import pytest
import torch
from hypothesis import settings
from torch import Tensor

logging.basicConfig()  # as the command line does: mlflow.pytorch would set a level that hides warnings
settings.register_profile("hpcm", deadline=None)  # How long an example takes depends on what else the machine does.
settings.load_profile("hpcm")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def picture() -> Tensor:
    """A smooth image, (1, 3, 256, 256)."""
    from formula import image

    return torch.from_numpy(image("picture", 256, 256))


@pytest.fixture(scope="session")
def golden_image() -> Tensor:
    """The image that the goldens were made from, (1, 3, 256, 256)."""
    from formula import image

    return torch.from_numpy(image("a", 256, 256))
