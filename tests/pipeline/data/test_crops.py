"""Batches depend only on seed and step."""

import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import crops as data
from pipeline.data.crops import StepBatches, TrainingCrops, training_loader, validation_images
from pipeline.data.images import Photos, find_images
from pipeline.data.pictures import DataError

SIDE = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """Five images; the red of image i is 50·i everywhere, green and blue say row and column."""
    folder = tmp_path_factory.mktemp("photos")
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(5):
        pixels = np.stack([np.full((SIDE, SIDE), 50 * number), rows, columns], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return find_images(folder, "train", 16)


def seen(crops: TrainingCrops, batches: StepBatches, workers: int = 0) -> list[dict[str, torch.Tensor]]:
    return list(training_loader(crops, batches, workers))


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a["image"], b["image"]) and torch.equal(a["sample"], b["sample"])
        for a, b in zip(one, other, strict=True)
    )


def photo_of(crops: TrainingCrops, n: int) -> int:
    return round(float(crops[n]["image"][0, 0, 0]) * 255 / 50)


def test_a_crop_is_a_piece_of_its_photograph(photos: Photos) -> None:
    crops = TrainingCrops(photos, crop=16, seed=1)
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
    unflipped = TrainingCrops(photos, crop=16, seed=1, flip=False)
    assert all(unflipped[n]["image"][2].diff(dim=1).min() > 0 for n in range(20))


def test_a_crop_as_large_as_the_image_is_the_image(photos: Photos) -> None:
    assert TrainingCrops(photos, crop=SIDE, seed=1)[0]["image"].shape == (3, SIDE, SIDE)


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=20)
def test_an_epoch_shows_every_photograph_once(photos: Photos, seed: int, epoch: int) -> None:
    crops = TrainingCrops(photos, crop=16, seed=seed)
    assert sorted(photo_of(crops, n) for n in range(5 * epoch, 5 * epoch + 5)) == [0, 1, 2, 3, 4]


def test_orders_differ_between_epochs_and_seeds(photos: Photos) -> None:
    one, other = (TrainingCrops(photos, crop=16, seed=seed) for seed in (1, 2))
    orders = {tuple(photo_of(one, n) for n in range(5 * epoch, 5 * epoch + 5)) for epoch in range(10)}
    assert len(orders) > 5
    assert [photo_of(one, n) for n in range(30)] != [photo_of(other, n) for n in range(30)]


def test_a_crop_does_not_depend_on_what_was_seen_before(photos: Photos) -> None:
    forwards, backwards = (TrainingCrops(photos, crop=16, seed=1) for _ in range(2))
    ahead = [forwards[n]["image"] for n in range(30)]
    behind = [backwards[n]["image"] for n in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(ahead, behind, strict=True))


def test_keeping_images_in_memory_changes_nothing(photos: Photos, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TrainingCrops(photos, crop=16, seed=1)
    first = [kept[n]["image"] for n in range(15)]
    assert len(kept._decoded) == 5
    monkeypatch.setattr(data, "MEMORY_BUDGET", 3 * photos.pixels - 1)
    unkept = TrainingCrops(photos, crop=16, seed=1)
    assert all(torch.equal(unkept[n]["image"], first[n]) for n in range(15))
    assert not unkept._decoded


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(photos: Photos, workers: int) -> None:
    crops = TrainingCrops(photos, crop=16, seed=1)
    batches = StepBatches(start_step=3, steps=5, batch_size=4)
    assert same(seen(crops, batches, workers), seen(crops, batches))


def test_a_resumed_run_sees_what_it_would_have_seen(photos: Photos) -> None:
    crops = TrainingCrops(photos, crop=16, seed=1)
    whole = seen(crops, StepBatches(start_step=0, steps=9, batch_size=4))
    rest = seen(TrainingCrops(photos, crop=16, seed=1), StepBatches(start_step=6, steps=3, batch_size=4))
    assert same(whole[6:], rest)


def test_a_late_step_costs_no_more_than_the_first(photos: Photos) -> None:
    (batch,) = seen(TrainingCrops(photos, 16, seed=1), StepBatches(start_step=10**9, steps=1, batch_size=4))
    assert batch["sample"].tolist() == [4 * 10**9 + i for i in range(4)]


def test_processes_share_a_batch(photos: Photos) -> None:
    crops = TrainingCrops(photos, crop=16, seed=1)
    (whole,) = seen(crops, StepBatches(start_step=7, steps=1, batch_size=6))
    parts = [seen(crops, StepBatches(7, 1, 6, rank=rank, world_size=3))[0]["image"] for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole["image"])


@given(st.integers(0, 10**9), st.integers(0, 20), st.integers(1, 8), st.integers(1, 8))
def test_processes_see_each_sample_once_and_in_order(start: int, steps: int, share: int, world: int) -> None:
    ranks = [StepBatches(start, steps, share * world, rank, world) for rank in range(world)]
    assert all(len(rank) == steps for rank in ranks)
    samples = [n for step in zip(*ranks, strict=True) for part in step for n in part]
    assert samples == list(range(start * share * world, (start + steps) * share * world))


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(DataError, match="a batch of 8 cannot be shared evenly by 3 processes"):
        StepBatches(start_step=0, steps=1, batch_size=8, world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_numbers_of_the_model_alone(photos: Photos, workers: int) -> None:
    crops = TrainingCrops(photos, crop=16, seed=1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    seen(crops, StepBatches(start_step=0, steps=2, batch_size=4), workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


class GroupOf(TrainingCrops):
    """Tells the process group that reads in place of a crop's number."""

    def __getitem__(self, n: int) -> dict[str, object]:
        return super().__getitem__(n) | {"sample": os.getpgrp()}


def test_workers_stand_outside_the_trainers_process_group(photos: Photos) -> None:
    (batch,) = seen(GroupOf(photos, crop=16, seed=1), StepBatches(0, steps=1, batch_size=2), workers=1)
    assert os.getpgrp() not in batch["sample"].tolist()


@pytest.fixture
def damaged(tmp_path: Path) -> Photos:
    """Four images, of which 1 and 2 have good headers and end too soon."""
    for number in range(4):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[:, :, 0] = 50 * number
        Image.fromarray(pixels).save(path)
        if number in (1, 2):
            path.write_bytes(path.read_bytes()[:1000])
    photos = find_images(tmp_path, "train", 16)
    assert len(photos.paths) == 4
    return photos


def test_a_damaged_photograph_is_replaced_by_the_next_and_named_once(
    damaged: Photos, caplog: pytest.LogCaptureFixture
) -> None:
    crops = TrainingCrops(damaged, crop=16, seed=1)
    for epoch in range(3):
        assert sorted(photo_of(crops, n) for n in range(4 * epoch, 4 * epoch + 4)) == [0, 3, 3, 3]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert {"1.png" in warning for warning in warnings} == {True, False}
    again = TrainingCrops(damaged, crop=16, seed=1)
    assert all(torch.equal(crops[n]["image"], again[n]["image"]) for n in range(8))


def test_of_all_workers_one_names_a_damaged_photograph(damaged: Photos, capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    data.logger.addHandler(handler)
    try:
        crops = TrainingCrops(damaged, crop=16, seed=1)
        seen(crops, StepBatches(0, steps=1, batch_size=8), workers=1)
        seen(crops, StepBatches(1, steps=4, batch_size=8), workers=2)
    finally:
        data.logger.removeHandler(handler)
    assert capfd.readouterr().err.count("1.png") == 1


def test_photographs_that_all_fail_are_an_error(damaged: Photos) -> None:
    for path in damaged.paths:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="none of the 4 images can be decoded"):
        TrainingCrops(damaged, crop=16, seed=1)[0]
    with pytest.raises(DataError, match="none of the 4 images can be decoded"):
        list(validation_images(damaged))


def test_a_photograph_that_has_shrunk_since_the_scan_is_replaced(
    damaged: Photos, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(damaged.paths[3])
    crops = TrainingCrops(damaged, crop=16, seed=1)
    assert {photo_of(crops, n) for n in range(4)} == {0}
    assert "3.png: smaller than 16×16 pixels" in caplog.text


def test_validation_images_come_whole_and_in_order(photos: Photos) -> None:
    images = list(validation_images(photos))
    assert [name for name, _ in images] == [f"{number}.png" for number in range(5)]
    for number, (_, image) in enumerate(images):
        assert (image.shape, image.dtype) == ((1, 3, SIDE, SIDE), torch.float32)
        assert (image[0, 0] * 255).round().unique().item() == 50 * number
    assert [name for name, _ in validation_images(photos, limit=2)] == ["0.png", "1.png"]


def test_a_damaged_validation_image_is_left_out_by_name(damaged: Photos, caplog: pytest.LogCaptureFixture) -> None:
    assert [name for name, _ in validation_images(damaged, limit=2)] == ["0.png", "3.png"]
    assert "1.png" in caplog.text
    assert "2.png" in caplog.text


class DiesIn(TrainingCrops):
    """Ends the process that reads it."""

    def __getitem__(self, n: int) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_worker_is_an_error_of_a_few_words(photos: Photos) -> None:
    message = r"a data worker died: DataLoader worker .*\n.*--set data.workers=…$"
    with pytest.raises(DataError, match=message) as caught, data.noticing_lost_workers():
        seen(DiesIn(photos, crop=16, seed=1), StepBatches(0, steps=1, batch_size=2), workers=1)
    assert str(caught.value).count("\n") == 1


def test_an_error_within_a_worker_is_one_line(damaged: Photos) -> None:
    for path in damaged.paths:
        path.unlink()
    with pytest.raises(DataError) as caught, data.noticing_lost_workers():
        seen(TrainingCrops(damaged, crop=16, seed=1), StepBatches(0, steps=1, batch_size=2), workers=1)
    assert str(caught.value) == f"{damaged.source}: none of the 4 images can be decoded"
