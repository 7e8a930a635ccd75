"""Batches for training and whole images for validation.

A training batch depends only on (seed, step). Crops are numbered over the whole run and all processes. The number n
and the seed determine the photograph, the position and the flip. So every worker, process and resumed run gives the
same crop for the same n.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from pipeline.data.images import Photos
from pipeline.data.pictures import DataError, read_image

MEMORY_BUDGET = 2**30
"""Bytes of decoded images that a training process and its workers may cache in total."""

logger = logging.getLogger(__name__)


class TrainingCrops(Dataset[dict[str, Any]]):
    """Square crops by number n ≥ 0, without end: `{"image": float32 (3, crop, crop) in [0, 1], "sample": n}`.

    An epoch shows every photograph once, in an order drawn from (seed, epoch). Position and flip are drawn from
    (seed, n). A photograph that cannot be decoded is reported once and replaced by the next usable one.
    """

    def __init__(self, photos: Photos, crop: int, seed: int) -> None:
        self.photos, self.crop, self.seed = photos, crop, seed
        self._decoded: dict[int, np.ndarray] = {}
        # In shared memory, so that only one of the data workers gives the warning.
        self._named = torch.zeros(len(photos.paths), dtype=torch.bool).share_memory_()

    def __getitem__(self, n: int) -> dict[str, Any]:
        """Crop number n. Raises DataError if no photograph can be decoded."""
        epoch, place = divmod(n, len(self.photos.paths))
        image = self._usable(int(_order(self.seed, epoch, len(self.photos.paths))[place]))
        draw = np.random.default_rng([self.seed, 1, n])
        top, left = (int(draw.integers(side - self.crop + 1)) for side in image.shape[:2])
        square = image[top : top + self.crop, left : left + self.crop]
        if draw.integers(2):
            square = square[:, ::-1]
        return {"image": to_tensor(square), "sample": n}

    def _usable(self, first: int) -> np.ndarray:
        count = len(self.photos.paths)
        for index in ((first + offset) % count for offset in range(count)):
            try:
                return self._read(index)
            except DataError as problem:
                if not self._named[index]:
                    self._named[index] = True
                    logger.warning("%s; replaced by the next usable image", problem)
        raise DataError(f"{self.photos.source}: none of the {count} images can be decoded")

    def _read(self, index: int) -> np.ndarray:
        if index in self._decoded:
            return self._decoded[index]
        path = self.photos.paths[index]
        image = read_image(Path(path))
        if min(image.shape[:2]) < self.crop:
            raise DataError(f"{path}: smaller than {self.crop}×{self.crop} pixels")
        reader = get_worker_info()
        if 3 * self.photos.pixels * (reader.num_workers if reader else 1) <= MEMORY_BUDGET:
            self._decoded[index] = image
        return image


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def to_tensor(image: np.ndarray) -> Tensor:
    """Pixels (H, W, 3) in 8 bits as float32 (3, H, W) in [0, 1]."""
    # NumPy divides, because torch would start threads, which costs more than dividing one crop.
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32) / 255)


@dataclass(frozen=True)
class StepBatches:
    """The sample numbers of one process for each of `steps` steps, beginning at `start_step`.

    Over all processes, step s has the samples s·batch_size … (s + 1)·batch_size − 1. Process `rank` takes the
    rank-th part of them, and computes it in `accumulate` equal micro-batches. Raises DataError if the batch cannot be
    divided evenly.
    """

    start_step: int
    steps: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        if self.batch_size % parts:
            each = f" with {self.accumulate} micro-batches each" if self.accumulate > 1 else ""
            raise DataError(
                f"a batch of {self.batch_size} cannot be shared evenly by {self.world_size} processes{each}; "
                f"make data.batch_size a multiple of {parts}"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for step in range(self.start_step, self.start_step + self.steps):
            first = step * self.batch_size + self.rank * share
            yield list(range(first, first + share))


Batch = dict[str, Any]


def training_loader(
    crops: TrainingCrops,
    batches: StepBatches,
    workers: int = 0,
    complete: Callable[[Batch], Batch] = lambda batch: batch,
) -> DataLoader[Any]:
    """Batches in step order: `image` (B / world_size, 3, crop, crop) and `sample` (B / world_size,).

    The workers `complete` each batch.
    """
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=lambda samples: complete(default_collate(samples)),
        # Forked workers end when the trainer is killed; workers of a fork server would stay.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Ctrl-C reaches only the process group of the trainer, which saves before the workers end.
        worker_init_fn=lambda worker: os.setpgid(0, 0),
        # Without its own generator, the loader would draw from the global one, and a resumed run would draw once more.
        generator=torch.Generator(),
    )


@contextmanager
def noticing_lost_workers() -> Iterator[None]:
    """Turn the error that torch raises when a data worker fails or is killed into a short DataError."""
    try:
        yield
    except DataError as error:
        # Torch puts the worker's traceback into the message.
        last = str(error).rstrip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")) from None
    except RuntimeError as error:  # Torch raises no more specific class for a dead worker.
        if not re.search(r"DataLoader worker \(pid.*\) (is killed|exited)", str(error)):
            raise
        raise DataError(
            f"a data worker died: {str(error).splitlines()[0][:160]}\n"
            "  The last saved state is kept. Run the same command again to resume from it. If memory is short, use "
            "fewer workers: --set data.workers=…"
        ) from error


def validation_images(photos: Photos, limit: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """At most `limit` whole images in order: (name, float32 (1, 3, H, W) in [0, 1]).

    An image that cannot be decoded is skipped with a warning. Raises DataError if none can be decoded.
    """
    given = 0
    for name, path in zip(photos.names, photos.paths, strict=True):
        if given == limit:
            return
        try:
            image = read_image(Path(path))
        except DataError as problem:
            logger.warning("%s; skipped in validation", problem)
            continue
        given += 1
        yield name, to_tensor(image)[None]
    if not given:
        raise DataError(f"{photos.source}: none of the {len(photos.paths)} images can be decoded")
