"""Training batches depend only on seed and step; validation images come whole and in order."""

import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import crops as crops_module
from pipeline.data.crops import (
    StepBatches,
    TrainingCrops,
    noticing_lost_workers,
    training_loader,
    validation_images,
)
from pipeline.data.images import Photos, find_images
from pipeline.data.pictures import DataError

SIDE = 40
CUT = 60
"""Bytes of an image that are kept: its header, and part of its pixels."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Five images. The red of image i is 50·i everywhere; green is the row, and blue the column."""
    folder = tmp_path_factory.mktemp("photos")
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(5):
        pixels = np.stack([np.full((SIDE, SIDE), 50 * number), rows, columns], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return find_images(folder, "train", 16)


@pytest.fixture
def damaged(photos: Photos, tmp_path: Path) -> Photos:
    """Four of these images, of which 1 and 2 are truncated after their header."""
    for number, path in enumerate(photos.paths[:4]):
        shutil.copy(path, tmp_path)
        if number in (1, 2):
            os.truncate(tmp_path / f"{number}.png", CUT)
    return find_images(tmp_path, "train", 16)


def crops_of(photos: Photos, seed: int = 1) -> TrainingCrops:
    return TrainingCrops(photos, crop=16, seed=seed)


def load(crops: TrainingCrops, batches: StepBatches, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    return list(training_loader(crops, batches, workers))


def photo_numbers(crops: TrainingCrops, samples: range) -> list[int]:
    """The photograph of each sample, by its red."""
    return [round(float(crops[n]["image"][0, 0, 0]) * 255 / 50) for n in samples]


def test_a_crop_is_part_of_its_photograph(photos: Photos) -> None:
    crops = crops_of(photos)
    corners, flips = set(), set()
    for n in range(60):
        image = crops[n]["image"]
        assert (image.shape, image.dtype) == ((3, 16, 16), torch.float32)
        _, rows, columns = (image * 255).round().int()
        assert (rows.diff(dim=0) == 1).all()
        assert (columns.diff(dim=1).abs() == 1).all()
        corners.add((int(rows.min()), int(columns.min())))
        flips.add(int(columns[0, 1] - columns[0, 0]))
    assert flips == {-1, 1}
    assert len(corners) > 50
    assert TrainingCrops(photos, crop=SIDE, seed=1)[0]["image"].shape == (3, SIDE, SIDE)


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=20)
def test_an_epoch_shows_every_photograph_once(photos: Photos, seed: int, epoch: int) -> None:
    assert sorted(photo_numbers(crops_of(photos, seed), range(5 * epoch, 5 * epoch + 5))) == [0, 1, 2, 3, 4]


def test_orders_differ_between_epochs_and_seeds(photos: Photos) -> None:
    one, other = (photo_numbers(crops_of(photos, seed), range(50)) for seed in (1, 2))
    assert len({tuple(one[first : first + 5]) for first in range(0, 50, 5)}) > 5
    assert one != other


def test_a_crop_depends_neither_on_earlier_crops_nor_on_the_cache(
    photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward, uncached = (crops_of(photos) for _ in range(3))
    expected = [forward[n]["image"] for n in range(30)]
    assert len(forward._decoded) == 5
    assert all(torch.equal(backward[n]["image"], expected[n]) for n in reversed(range(30)))
    monkeypatch.setattr(crops_module, "MEMORY_BUDGET", 3 * photos.pixels - 1)
    assert all(torch.equal(uncached[n]["image"], expected[n]) for n in range(30))
    assert not uncached._decoded


@given(st.integers(0, 10**9), st.integers(0, 20), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=40)
def test_processes_get_each_sample_once_and_in_order(start: int, steps: int, share: int, world: int) -> None:
    ranks = [StepBatches(start, steps, share * world, rank, world) for rank in range(world)]
    assert all(len(rank) == steps for rank in ranks)
    samples = [n for step in zip(*ranks, strict=True) for part in step for n in part]
    assert samples == list(range(start * share * world, (start + steps) * share * world))


def test_a_resumed_run_with_other_workers_gets_the_batches_of_an_uninterrupted_run(photos: Photos) -> None:
    whole = load(crops_of(photos), StepBatches(start_step=0, steps=9, batch_size=4))
    resumed = load(crops_of(photos), StepBatches(start_step=6, steps=3, batch_size=4), workers=2)
    for expected, found in zip(whole[6:], resumed, strict=True):
        assert torch.equal(found["image"], expected["image"])
        assert torch.equal(found["sample"], expected["sample"])


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 8 cannot be shared evenly by 3 processes"):
        StepBatches(start_step=0, steps=1, batch_size=8, world_size=3)
    with pytest.raises(DataError, match="2 processes with 8 micro-batches each; make data"):
        StepBatches(start_step=0, steps=1, batch_size=8, world_size=2, accumulate=8)


class CropsWithProcessGroup(TrainingCrops):
    """Returns the process group of the reading process in place of a crop's number."""

    def __getitem__(self, n: int) -> dict[str, object]:
        return super().__getitem__(n) | {"sample": os.getpgrp()}


def test_workers_leave_the_process_group_of_the_trainer(photos: Photos) -> None:
    crops = CropsWithProcessGroup(photos, crop=16, seed=1)
    (batch,) = load(crops, StepBatches(0, steps=1, batch_size=2), workers=1)
    assert os.getpgrp() not in batch["sample"].tolist()


def test_a_damaged_photograph_is_named_once_and_replaced_by_the_next(
    damaged: Photos, caplog: pytest.LogCaptureFixture
) -> None:
    crops, again = crops_of(damaged), crops_of(damaged)
    for epoch in range(3):
        assert sorted(photo_numbers(crops, range(4 * epoch, 4 * epoch + 4))) == [0, 3, 3, 3]
    assert [caplog.text.count(name) for name in ("1.png", "2.png")] == [1, 1]
    assert all(torch.equal(crops[n]["image"], again[n]["image"]) for n in range(8))
    Image.new("RGB", (8, 8)).save(damaged.paths[3])
    assert set(photo_numbers(crops_of(damaged), range(4))) == {0}
    assert "3.png: smaller than 16×16 pixels" in caplog.text


def test_only_one_of_several_workers_names_a_damaged_photograph(
    damaged: Photos, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler()
    crops_module.logger.addHandler(handler)
    try:
        crops = crops_of(damaged)
        load(crops, StepBatches(0, steps=1, batch_size=8), workers=1)
        load(crops, StepBatches(1, steps=4, batch_size=8), workers=2)
    finally:
        crops_module.logger.removeHandler(handler)
    assert capfd.readouterr().err.count("1.png") == 1


def test_it_is_an_error_if_no_photograph_can_be_decoded(damaged: Photos) -> None:
    for path in damaged.paths:
        os.truncate(path, CUT)
    message = f"{damaged.source}: none of the 4 images can be decoded"
    for workers in (0, 1):  # A worker's error is one line too.
        with pytest.raises(DataError) as caught, noticing_lost_workers():
            load(crops_of(damaged), StepBatches(0, steps=1, batch_size=2), workers)
        assert str(caught.value) == message


class KillsItsReader(TrainingCrops):
    """Kills the process that reads it."""

    def __getitem__(self, n: int) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_gives_a_short_error(photos: Photos) -> None:
    message = r"a data worker died: DataLoader worker .*\n.*--set data.workers=…$"
    with pytest.raises(DataError, match=message) as caught, noticing_lost_workers():
        load(KillsItsReader(photos, crop=16, seed=1), StepBatches(0, steps=1, batch_size=2), workers=1)
    assert str(caught.value).count("\n") == 1


def test_validation_images_come_whole_and_in_order(
    photos: Photos, damaged: Photos, caplog: pytest.LogCaptureFixture
) -> None:
    images = list(validation_images(photos))
    assert [name for name, _ in images] == [f"{number}.png" for number in range(5)]
    for number, (_, image) in enumerate(images):
        assert (image.shape, image.dtype) == ((1, 3, SIDE, SIDE), torch.float32)
        assert (image[0, 0] * 255).round().unique().item() == 50 * number
    assert [name for name, _ in validation_images(damaged, limit=2)] == ["0.png", "3.png"]
    assert [caplog.text.count(name) for name in ("1.png", "2.png")] == [1, 1]
    os.truncate(damaged.paths[0], CUT)
    os.truncate(damaged.paths[3], CUT)
    with pytest.raises(DataError, match=f"{damaged.source}: none of the 4 images can be decoded"):
        list(validation_images(damaged))
