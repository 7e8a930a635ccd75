"""Photographs on disk: usable, broken and unusual ones."""

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.common import memory
from pipeline.data import image_index
from pipeline.data import images as images_module
from pipeline.data.image_index import FileStamp
from pipeline.data.images import find_images
from pipeline.data.pictures import DataError, read_image, read_picture


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng([height, width]).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, height: int = 40, width: int = 48, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width)).save(path, **options)
    return path


def claim_size(path: Path, side: int) -> None:
    """Make a PNG's header claim to be `side` × `side` pixels."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_packaged_photographs_need_no_folder_and_no_network() -> None:
    train, val = (find_images(None, split, 256) for split in ("train", "val"))
    assert (len(train.paths), len(val.paths)) == (6, 2)
    assert not set(train.names) & set(val.names)
    assert train.skipped == val.skipped == ()
    for path in (*train.paths, *val.paths):
        image = read_image(path)
        assert image.std(axis=2).mean() > 1, "a gray picture"


def test_a_folder_is_searched_to_its_depth_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", "c.bmp", "d.tif", "e.tiff", "f.ppm", "g.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image by its name")
    photos = find_images(tmp_path, "train", 32)
    assert photos.names == ("a/b/c.webp", "a/z.JPG", "b.png", "c.bmp", "d.tif", "e.tiff", "f.ppm", "g.jpeg")
    assert [path.relative_to(tmp_path).as_posix() for path in photos.paths] == list(photos.names)
    assert list(photos.paths[1:]) == list(photos.paths)[1:]
    assert photos.pixels == 8 * 40 * 48
    assert photos.skipped == ()
    assert (photos.name, photos.source) == (tmp_path.name, str(tmp_path))


def test_every_unusable_file_is_skipped_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "header.png").write_bytes(save(tmp_path / "x.png").read_bytes()[:20])
    (tmp_path / "x.png").unlink()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    claim_size(save(tmp_path / "bomb.png"), 10_000)
    claim_size(save(tmp_path / "bombs.png"), 30_000)
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    save(tmp_path / "small.png", 31, 200)
    photos = find_images(tmp_path, "train", 32)
    assert photos.names == ("good.png",)
    reasons = {path.name: reason for path, reason in photos.skipped}
    assert reasons["empty.png"] == "empty file"
    assert reasons["text.jpg"].startswith("damaged, or not an image")
    assert reasons["header.png"].startswith("cannot be read: ")
    assert reasons["gone.png"] == "no such file"
    assert reasons["pipe.png"] == "not a regular file"
    assert reasons["bomb.png"] == reasons["bombs.png"] == f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    assert reasons["script.png"].startswith("damaged, or not an image")
    assert reasons["small.png"] == "200×31, smaller than 32×32 pixels"
    assert len(reasons) == 9


def test_small_images_are_good_enough_for_validation(tmp_path: Path) -> None:
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


def test_the_digest_follows_names_and_contents_of_usable_images(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    first, second = (find_images(tmp_path / folder, "train", 32).digest for folder in "ab")
    assert first == second
    (tmp_path / "a" / "broken.png").touch()
    assert find_images(tmp_path / "a", "train", 32).digest == first
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    renamed = find_images(tmp_path / "a", "train", 32).digest
    save(tmp_path / "b" / "1.png", 41, 48)
    resized = find_images(tmp_path / "b", "train", 32).digest
    save(tmp_path / "b" / "2.png")
    assert len({first, renamed, resized, find_images(tmp_path / "b", "train", 32).digest}) == 4


def test_scanning_decodes_headers_only(tmp_path: Path) -> None:
    path = save(tmp_path / "0.jpg", 256, 256)
    path.write_bytes(path.read_bytes()[:1000])
    assert find_images(tmp_path, "train", 32).names == ("0.jpg",)


def other_content(path: Path) -> None:
    """Change a bitmap's last pixel: same name, same size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


def test_the_digest_follows_contents_of_equal_size(tmp_path: Path) -> None:
    path = save(tmp_path / "0.bmp")
    first, size = find_images(tmp_path, "val", 1).digest, path.stat().st_size
    other_content(path)
    assert path.stat().st_size == size
    assert find_images(tmp_path, "val", 1).digest != first


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, runs, opened = tmp_path / "images", tmp_path / "runs", []
    paths = [save(images / f"{number}.bmp") for number in range(3)]
    runs.mkdir()
    digest, look = image_index._digest, images_module.opened
    monkeypatch.setattr(image_index, "SETTLED", 0)
    monkeypatch.setattr(image_index, "_digest", lambda path: opened.append(path.name) or digest(path))
    monkeypatch.setattr(images_module, "opened", lambda path: opened.append(path.name) or look(path))
    first = find_images(images, "val", 1, runs)
    assert sorted(opened) == sorted([path.name for path in paths] * 2)
    opened.clear()
    assert find_images(images, "val", 1, runs) == first
    assert opened == []
    status = paths[1].stat()
    other_content(paths[1])
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))  # as programs do that copy times
    changed = find_images(images, "val", 1, runs)
    assert opened == ["1.bmp", "1.bmp"]
    assert changed.digest == find_images(images, "val", 1).digest != first.digest


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    path, now = save(tmp_path / "images" / "0.bmp"), time.time_ns()
    # Both changes within one tick of a coarse clock.
    monkeypatch.setattr(FileStamp, "of", lambda status: FileStamp(status.st_size, now, now))
    first = find_images(path.parent, "val", 1, tmp_path / "runs")
    other_content(path)
    assert find_images(path.parent, "val", 1, tmp_path / "runs").digest != first.digest


@pytest.mark.parametrize("content", [b"", b"no database" * 500])
def test_a_damaged_index_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / image_index.FILE).write_bytes(content)
    path = save(tmp_path / "images" / "0.bmp")
    os.utime(path, (1, 1))
    found = find_images(path.parent, "val", 1, tmp_path / "runs")
    assert found == find_images(path.parent, "val", 1)


def test_what_a_run_makes_is_no_image_to_train_on(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    for runs in ("runs", "older"):
        save(tmp_path / runs / "mini" / "lmbda-0.013" / "baseline" / "reconstructions" / "0.png")
    (tmp_path / "older" / "mlflow.db").touch()
    assert find_images(tmp_path, "train", 32, tmp_path / "runs").names == ("0.png",)
    with pytest.raises(DataError, match="this is a folder of runs, and its images are reconstructions"):
        find_images(tmp_path, "train", 32, tmp_path)


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    save(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"b\xff.png"))
    found = find_images(tmp_path, "val", 1)
    assert found.names == ("b\\xff.png",)
    assert read_image(found.paths[0]).shape == (40, 48, 3)


def test_an_image_beyond_the_memory_is_skipped_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "0.png", 100, 200)
    save(tmp_path / "1.png", 40, 48)
    monkeypatch.setattr(memory, "memory_limit", lambda: 2 * 16 * 100 * 199)
    found = find_images(tmp_path, "val", 1)
    assert found.names == ("1.png",)
    assert "200×100 pixels: needs 0.0 GB of memory" in found.skipped[0][1] or "100×200" in found.skipped[0][1]


@pytest.mark.parametrize(("suffix", "size"), [("png", 2**40), ("png", 2**30), ("webp", 2**40)])
def test_a_file_far_larger_than_its_pixels_is_not_read(suffix: str, size: int, tmp_path: Path) -> None:
    path = save(tmp_path / f"0.{suffix}")
    os.truncate(path, size)  # Sparse: it takes no room.
    with pytest.raises(DataError, match=r"far more than .* can have"):
        read_image(path)
    with pytest.raises(DataError, match="no usable image"):
        find_images(tmp_path, "val", 1)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path / "0.png")


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "ppm"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, cut: float) -> None:
    path = save(tmp_path / f"cut.{suffix}", 64, 64)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
        read_image(path)


def test_pages_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can have millions of them, and Pillow reads each to count them."""
    pages = [Image.fromarray(noise(8, 8)) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda page: pytest.fail("counts the pages")))
    picture = read_picture(tmp_path / "pages.tif")
    assert picture.changes == ("only the first frame was kept",)
    assert np.array_equal(picture.pixels, noise(8, 8))


def test_an_image_is_turned_the_right_way_up(tmp_path: Path) -> None:
    pixels = noise(3, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("png", mode) for mode in ("1", "L", "P", "RGB", "LA", "RGBA")),
        *(("tif", mode) for mode in ("1", "L", "P", "RGB", "LA", "RGBA", "CMYK")),
        *(("jpg", mode) for mode in ("L", "RGB", "CMYK")),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    gray = np.repeat(noise(8, 8, 1)[:, :, None] // 128 * 255, 3, axis=2)
    Image.fromarray(gray).convert(mode).save(tmp_path / f"picture.{suffix}", quality=100)
    image = read_image(tmp_path / f"picture.{suffix}")
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    assert np.abs(image.astype(int) - gray).max() <= (16 if suffix == "jpg" else 0)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 51)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    Image.fromarray(noise(2, 2, 1)).convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    image = read_image(tmp_path / "clear.png")
    assert image.tolist() == [[[10, 20, 30], [204, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    assert (read_image(tmp_path / "palette.png") == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 257 * 7], [257 * 200 + 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    assert read_image(tmp_path / f"deep.{suffix}")[:, :, 1].tolist() == [[0, 7], [200, 255]]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: .*8 or 16"):
        read_image(tmp_path / "float.tif")
