"""Photographs for training and validation.

What a training step sees is a function of (seed, step) alone. Every crop has a number n, counted over the
whole run and all processes: n decides the photograph, the position and the flip. So any worker, any process
and any resumed run gives the same crop for the same n.
"""

import hashlib
import logging
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import distribution
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
# Pillow goes by content, and some of its formats start other programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
# Wheels of scikit-image and scikit-learn carry these, so no network is needed.
PACKAGED = {
    "train": (
        ("scikit-image", "skimage/data/astronaut.png"),
        ("scikit-image", "skimage/data/chelsea.png"),
        ("scikit-image", "skimage/data/motorcycle_left.png"),
        ("scikit-image", "skimage/data/motorcycle_right.png"),
        ("scikit-image", "skimage/data/rocket.jpg"),
        ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    ),
    "val": (
        ("scikit-image", "skimage/data/coffee.png"),
        ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    ),
}
MEMORY_BUDGET = 2**30
"""Bytes of decoded images that a training process and its workers keep together."""

logger = logging.getLogger(__name__)


class DataError(Exception):
    """Images that cannot be used; the message names the file or folder and what to do."""


@dataclass(frozen=True)
class Photos:
    """Images whose headers were read, in the order of their names.

    `names` are relative to the folder, with `/`; `pixels` counts all images together. `digest` is the SHA-256
    (hexadecimal) of every name and size in bytes: it notices images that come, go or are replaced by others of
    another size, and costs no reading of the contents. `name` and `source` are for the tracking of a run.
    """

    name: str
    source: str
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    pixels: int
    skipped: tuple[tuple[Path, str], ...]
    digest: str


def find_images(folder: Path | None, split: Literal["train", "val"], minimum: int) -> Photos:
    """Find the usable images of a folder and those below it; of None, the packaged photographs.

    Only headers are read. For training, images with a side shorter than `minimum` pixels are skipped. Raises
    DataError where no usable image is left.
    """
    if folder is None:
        found = [(name, Path(str(distribution(wheel).locate_file(name)))) for wheel, name in PACKAGED[split]]
        name, source = f"packaged-{split}", "photographs in the wheels of scikit-image and scikit-learn"
    else:
        found = _walk(folder)
        name, source = folder.resolve().name, str(folder.resolve())

    digest, pixels = hashlib.sha256(), 0
    usable: list[tuple[str, Path]] = []
    skipped: list[tuple[Path, str]] = []
    for relative, path in sorted(found):
        try:
            size = _file_size(path)
            with _opened(path) as picture:
                width, height = picture.size
            if split == "train" and min(width, height) < minimum:
                raise DataError(f"{path}: {width}×{height}, smaller than {minimum}×{minimum} pixels")
        except DataError as problem:
            skipped.append((path, str(problem).removeprefix(f"{path}: ")))
            continue
        usable.append((relative, path))
        pixels += width * height
        digest.update(os.fsencode(relative) + f"\0{size}\n".encode())
    if not usable:
        raise DataError(_nothing_usable(source, split, skipped))
    names, paths = zip(*usable, strict=True)
    return Photos(name, source, names, paths, pixels, tuple(skipped), digest.hexdigest())


def _walk(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder of images ({' '.join(SUFFIXES)})")
    found = []
    for root, _, files in os.walk(folder):
        paths = (Path(root, file) for file in files if file.lower().endswith(SUFFIXES))
        found += [(path.relative_to(folder).as_posix(), path) for path in paths]
    return found


def _nothing_usable(source: str, split: str, skipped: list[tuple[Path, str]]) -> str:
    lines = [
        f"{source}: no usable image for {split}; looked for {' '.join(SUFFIXES)} here and in all folders below",
        *(f"  skipped {path}: {reason}" for path, reason in skipped[:5]),
        *([f"  … and {len(skipped) - 5} more"] if len(skipped) > 5 else []),
        "Give another folder (DATA= for training, VAL= for validation), or none for the packaged photographs.",
    ]
    return "\n".join(lines)


def _file_size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as problem:
        raise DataError(f"{path}: {problem.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise DataError(f"{path}: empty file")
    return status.st_size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: broken, or no image ({' '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    # On damaged files Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error, KeyError …
    except Exception as problem:
        raise DataError(f"{path}: cannot be read: {problem or type(problem).__name__}") from problem


def read_image(path: Path) -> np.ndarray:
    """Decode an image into uint8 RGB, (H, W, 3), the right way up (EXIF).

    16 bits a channel become 8, transparency is laid on white, grey, palette and CMYK become RGB without a
    colour profile, and of several pages or frames the first counts. Raises DataError naming the file.
    """
    with _opened(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode[0] in "IF":
            return _from_deep_grey(np.asarray(upright))
        if upright.has_transparency_data:
            opaque = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(opaque, upright.convert("RGBA"))
        return np.array(upright.convert("RGB"))


def _from_deep_grey(grey: np.ndarray) -> np.ndarray:
    if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("grey values beyond 16 bits; save the image with 8 or 16")
    eight = np.round(grey / 257).astype(np.uint8)
    return np.repeat(eight[:, :, None], 3, axis=2)


class TrainingCrops(Dataset[dict[str, Any]]):
    """Square crops by number n ≥ 0, without end: `{"image": float32 (3, crop, crop) in [0, 1], "sample": n}`.

    Each epoch of len(photos) numbers shows every photograph once, in an order drawn from (seed, epoch); position
    and flip are drawn from (seed, n). A photograph that cannot be decoded is named once in a warning, and the
    next usable one takes its place.
    """

    def __init__(self, photos: Photos, crop: int, seed: int, flip: bool = True) -> None:
        self.photos = photos
        self.crop = crop
        self.seed = seed
        self.flip = flip
        self._decoded: dict[int, np.ndarray] = {}
        # Shared memory, so that of all reading processes one gives the warning.
        self._named = torch.zeros(len(photos.paths), dtype=torch.bool).share_memory_()

    def __getitem__(self, n: int) -> dict[str, Any]:
        """The crop number n. Raises DataError where no photograph at all can be decoded."""
        epoch, place = divmod(n, len(self.photos.paths))
        image = self._usable(int(_order(self.seed, epoch, len(self.photos.paths))[place]))
        draw = np.random.default_rng([self.seed, 1, n])
        top, left = (int(draw.integers(side - self.crop + 1)) for side in image.shape[:2])
        square = image[top : top + self.crop, left : left + self.crop]
        if self.flip and draw.integers(2):
            square = square[:, ::-1]
        return {"image": _to_tensor(square), "sample": n}

    def _usable(self, first: int) -> np.ndarray:
        count = len(self.photos.paths)
        for index in ((first + offset) % count for offset in range(count)):
            try:
                return self._read(index)
            except DataError as problem:
                if not self._named[index]:
                    self._named[index] = True
                    logger.warning("%s; the next usable image takes its place", problem)
        raise DataError(f"{self.photos.source}: none of the {count} images can be decoded")

    def _read(self, index: int) -> np.ndarray:
        if index in self._decoded:
            return self._decoded[index]
        path = self.photos.paths[index]
        image = read_image(path)
        if min(image.shape[:2]) < self.crop:
            raise DataError(f"{path}: smaller than {self.crop}×{self.crop} pixels")
        reader = get_worker_info()
        if 3 * self.photos.pixels * (reader.num_workers if reader else 1) <= MEMORY_BUDGET:
            self._decoded[index] = image
        return image


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)) / 255


@dataclass(frozen=True)
class StepBatches:
    """The sample numbers of one process, step by step, from `start_step` on for `steps` steps.

    Step s is samples s·batch_size … (s + 1)·batch_size − 1, all processes together; process `rank` takes the
    rank-th part of it. Raises ValueError where `world_size` does not divide `batch_size`.
    """

    start_step: int
    steps: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be shared evenly by {self.world_size} processes; "
                f"make data.batch_size a multiple of {self.world_size}"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for step in range(self.start_step, self.start_step + self.steps):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))


def training_loader(crops: TrainingCrops, batches: StepBatches, workers: int = 0) -> DataLoader[Any]:
    """Batches in step order: `image` (B / world_size, 3, crop, crop) and `sample` (B / world_size,)."""
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_stand_apart,
        # Without its own, the loader draws from the global generator, and a resumed run would draw once more.
        generator=torch.Generator(),
    )


def _stand_apart(worker: int) -> None:
    """Leave the trainer's process group: Ctrl-C is for the trainer, which must save before its workers end."""
    os.setpgid(0, 0)


def validation_images(photos: Photos, limit: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Whole images in order, at most `limit`: (name, float32 (1, 3, H, W) in [0, 1]).

    One that cannot be decoded is left out with a warning. Raises DataError where none can.
    """
    return _at_least_one(photos, islice(_decodable(photos), limit))


def _decodable(photos: Photos) -> Iterator[tuple[str, Tensor]]:
    for name, path in zip(photos.names, photos.paths, strict=True):
        try:
            yield name, _to_tensor(read_image(path))[None]
        except DataError as problem:
            logger.warning("%s; left out of validation", problem)


def _at_least_one(photos: Photos, images: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    empty = True
    for empty, image in ((False, image) for image in images):
        yield image
    if empty:
        raise DataError(f"{photos.source}: none of the {len(photos.paths)} images can be decoded")
