"""Images in folders: which are found, which are skipped and why, what the digest covers, and what is cached."""

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.common import memory
from pipeline.data import image_index
from pipeline.data.images import find_images
from pipeline.data.pictures import DataError, read_image


def save(path: Path, height: int = 40, width: int = 48) -> Path:
    """Save an image whose pixels depend only on its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def claim_size(path: Path, side: int) -> None:
    """Change a PNG's header so that it claims to be `side` × `side` pixels."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def change_last_byte(path: Path) -> None:
    """Change a bitmap's last pixel; name and size stay."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


def test_packaged_photographs_need_no_folder_and_no_network() -> None:
    train, val = (find_images(None, split, 256) for split in ("train", "val"))
    assert (len(train.paths), len(val.paths)) == (6, 2)
    assert not set(train.names) & set(val.names)
    assert train.skipped == val.skipped == ()
    assert all(read_image(Path(path)).std(axis=2).mean() > 1 for path in train.paths + val.paths), "a gray picture"


def test_images_are_found_at_any_depth_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ("a/b/c.webp", "a/z.JPG", "b.png", "c.bmp", "d.tif", "e.tiff", "f.ppm", "g.jpeg", "h.avif", "i.gif")
    for name in reversed(names):
        save(tmp_path / name)
    photos = find_images(tmp_path, "train", 32)
    assert photos.names == names
    assert photos.paths == tuple(f"{tmp_path}/{name}" for name in names)
    assert (photos.pixels, photos.skipped) == (len(names) * 40 * 48, ())
    assert (photos.name, photos.source) == (tmp_path.name, str(tmp_path))


@pytest.mark.filterwarnings("ignore:Image size")  # pytest replaces the filter of pipeline.data.pictures
def test_every_unusable_file_is_skipped_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "header.png").write_bytes((tmp_path / "good.png").read_bytes()[:20])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    claim_size(save(tmp_path / "bomb.png"), 10_000)
    claim_size(save(tmp_path / "bombs.png"), 30_000)
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    save(tmp_path / "small.png", 31, 200)
    photos = find_images(tmp_path, "train", 32)
    assert photos.names == ("good.png",)
    beginnings = {
        "bomb.png": f"10000×10000, more than {Image.MAX_IMAGE_PIXELS} pixels; commands with --max-pixels",
        "bombs.png": f"more than {Image.MAX_IMAGE_PIXELS} pixels",
        "empty.png": "empty file",
        "gone.png": "no such file",
        "header.png": "cannot be read: ",
        "pipe.png": "not a regular file",
        "script.png": "damaged, or not an image of a supported format (PNG, ",
        "small.png": "200×31, smaller than 32×32 pixels",
        "text.jpg": "damaged, or not an image of a supported format (PNG, ",
    }
    assert [Path(path).name for path, _ in photos.skipped] == list(beginnings)
    assert all(reason.startswith(beginnings[Path(path).name]) for path, reason in photos.skipped)


def test_files_of_other_kinds_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "labels/d.txt", "README", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path / "labels")
    counts = "5 of kinds that are not read (.heic: 2, links to folders: 1, no suffix: 1, .txt: 1)"
    photos = find_images(tmp_path, "val", 1)
    assert (photos.names, photos.skipped) == (("a.png",), ((str(tmp_path), counts),))
    for number in range(5):
        (tmp_path / f"b.{number}").touch()
    assert find_images(tmp_path, "val", 1).skipped[0][1].endswith(", …)")


def test_small_images_are_used_for_validation(tmp_path: Path) -> None:
    save(tmp_path / "small.png", 20, 20)
    assert find_images(tmp_path, "val", 32).names == ("small.png",)


def test_no_usable_image_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; give a folder of images"):
        find_images(tmp_path / "nowhere", "train", 32)
    with pytest.raises(DataError, match=r"no usable image for train; looked for .png .jpg(?s:.*)data.train"):
        find_images(tmp_path, "train", 32)
    for number in range(7):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(DataError, match=r"skipped .*4.png: empty file\n  … and 2 more"):
        find_images(tmp_path, "val", 32)


def test_the_digest_covers_names_and_contents_of_usable_images(tmp_path: Path) -> None:
    def digest() -> str:
        return find_images(tmp_path / "images", "train", 32).digest

    path = save(tmp_path / "images" / "1.bmp")
    digests = [digest()]
    (tmp_path / "images" / "broken.png").touch()
    assert digest() == digests[0]
    (tmp_path / "images").rename(tmp_path / "renamed")
    assert find_images(tmp_path / "renamed", "train", 32).digest == digests[0]
    (tmp_path / "renamed").rename(tmp_path / "images")
    change_last_byte(path)
    digests.append(digest())
    path.rename(path.with_name("2.bmp"))
    digests.append(digest())
    save(tmp_path / "images" / "3.bmp")
    digests.append(digest())
    assert len(set(digests)) == 4


def test_a_file_is_read_again_only_if_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, runs, read = tmp_path / "images", tmp_path / "runs", []
    paths = [save(images / f"{number}.bmp") for number in range(3)]
    runs.mkdir()
    original = image_index._read
    monkeypatch.setattr(image_index, "SETTLED", 0)
    monkeypatch.setattr(image_index, "_read", lambda path: read.append(path) or original(path))
    first = find_images(images, "val", 1, runs)
    assert sorted(read) == paths
    assert find_images(images, "val", 1, runs) == first
    assert len(read) == 3
    status = paths[1].stat()
    change_last_byte(paths[1])
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))  # as programs do that copy times
    changed = find_images(images, "val", 1, runs)
    assert read[3:] == [paths[1]]
    assert changed.digest == find_images(images, "val", 1).digest != first.digest


def test_a_file_that_changed_within_one_clock_tick_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    path, now = save(tmp_path / "images" / "0.bmp"), time.time_ns()
    monkeypatch.setattr(image_index, "_stamp", lambda name: (path.stat().st_size, now, now))
    first = find_images(path.parent, "val", 1, tmp_path / "runs")
    change_last_byte(path)
    assert find_images(path.parent, "val", 1, tmp_path / "runs").digest != first.digest


@pytest.mark.parametrize("content", [b"", b"no database" * 500])
def test_a_damaged_index_is_replaced(content: bytes, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / image_index.FILE).write_bytes(content)
    path = save(tmp_path / "images" / "0.bmp")
    assert find_images(path.parent, "val", 1, runs) == find_images(path.parent, "val", 1)
    assert (runs / image_index.FILE).read_bytes().startswith(b"SQLite format 3")


@pytest.mark.parametrize("marks", [["mlflow.db"], ["images.db"], ["report.html"], ["record.json", "metrics.jsonl"]])
def test_images_that_runs_made_are_left_out(marks: list[str], tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    for runs in ("runs", "older"):
        save(tmp_path / runs / "baseline" / "reconstructions" / "0.png")
    for mark in marks:
        (tmp_path / "older" / mark).touch()
    assert find_images(tmp_path, "train", 32, tmp_path / "runs").names == ("0.png",)
    with pytest.raises(DataError, match="this is a folder of runs, and its images are reconstructions"):
        find_images(tmp_path, "train", 32, tmp_path)


def test_names_that_are_not_utf8_are_printable(tmp_path: Path) -> None:
    save(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"b\xff.png"))
    found = find_images(tmp_path, "val", 1)
    assert found.names == ("b\\xff.png",)
    assert read_image(Path(found.paths[0])).shape == (40, 48, 3)


def test_an_image_beyond_the_memory_is_skipped_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "0.png", 100, 200)
    save(tmp_path / "1.png", 40, 48)
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * 16 * 100 * 199)
    found = find_images(tmp_path, "val", 1)
    assert found.names == ("1.png",)
    assert found.skipped[0][1].startswith("200×100 pixels: needs 0.0 GB of memory")
