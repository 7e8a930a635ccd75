from pathlib import Path

import numpy as np
import pytest
from mini import mini_codec
from PIL import Image, ImageCms

from pipeline.weights.checkpoints import publish
from pipeline.weights.published import Lineage


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint of an untrained mini codec of Phase 4."""
    path = tmp_path_factory.mktemp("codec") / "checkpoint.safetensors"
    publish(path, mini_codec(4), Lineage(name="mini"))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a photograph, another one with a profile and an orientation below it, and a file without image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "more" / "turned.jpg", exif=exif, icc_profile=profile)
    (folder / "notes.txt").write_text("no image")
    return folder
