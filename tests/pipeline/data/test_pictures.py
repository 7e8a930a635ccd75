"""Decoding of image files: every supported kind of pixel, and refusal of damaged and oversized files."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.data.pictures import DataError, read_image, read_picture


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options: object) -> Path:
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("png", "1 L P RGB LA RGBA"),
        ("tif", "1 L P RGB LA RGBA CMYK"),
        ("jpg", "L RGB CMYK"),
        ("webp", "RGB RGBA"),
        ("avif", "RGB RGBA"),
        ("gif", "1 L P RGB"),
        ("pgm", "L"),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(suffix: str, modes: str, tmp_path: Path) -> None:
    gray = np.repeat(noise(8, 8)[:, :, None] // 128 * 255, 3, axis=2)
    for mode in modes.split():
        image = read_image(save(tmp_path / f"{mode}.{suffix}", gray, mode, quality=100))
        assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
        assert np.abs(image.astype(int) - gray).max() <= (16 if suffix in ("jpg", "webp", "avif") else 0)


@pytest.mark.parametrize("suffix", ["tif", "gif", "avif"])
def test_only_the_first_frame_is_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TIFF pages are not counted: a small file can have millions, and Pillow reads each to count them."""
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda page: pytest.fail("counts the pages")))
    first, *others = (Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue"))
    first.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=others)
    picture = read_picture(tmp_path / f"frames.{suffix}")
    assert picture.changes == ("only the first frame was kept",)
    assert np.abs(picture.pixels.astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "avif"])
def test_the_exif_orientation_is_applied(suffix: str, tmp_path: Path) -> None:
    halves = np.repeat(np.uint8([[[255, 0, 0]] * 16 + [[0, 0, 255]] * 16]), 16, axis=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = read_image(save(tmp_path / f"turned.{suffix}", halves, exif=exif, quality=100))
    assert np.abs(image.astype(int) - np.rot90(halves, -1)).mean() <= (0 if suffix == "png" else 20)


def test_transparency_is_blended_with_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (0, 0, 0, 51)
    picture = read_picture(save(tmp_path / "clear.png", pixels))
    assert picture.pixels.tolist() == [[[10, 20, 30], [204, 204, 204]], [[255, 255, 255], [255, 255, 255]]]
    assert picture.changes == ("transparency was blended with white",)
    assert (read_image(save(tmp_path / "palette.png", noise(2, 2), "P", transparency=bytes(256))) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(suffix: str, tmp_path: Path) -> None:
    deep = np.array([[0, 257 * 7], [257 * 200 + 100, 65535]], np.uint16)
    picture = read_picture(save(tmp_path / f"deep.{suffix}", deep))
    assert picture.pixels[:, :, 1].tolist() == [[0, 7], [200, 255]]
    assert picture.changes == ("16 bits a channel became 8",)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"float\.tif: .*8 or 16"):
        read_image(save(tmp_path / "float.tif", np.full((4, 4), 0.5, np.float32)))


def test_a_damaged_color_profile_is_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "profile.png", noise(8, 8, 3))
    content, chunk = path.read_bytes(), b"iCCP" + b"name\0\0" + b"no profile"
    profile = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:33] + profile + content[33:])
    assert read_picture(path).icc_profile == b""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp", "tif", "ppm", "gif"])
def test_a_truncated_image_is_an_error_that_names_it(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"cut.{suffix}", noise(64, 64, 3))
    content = path.read_bytes()
    for kept in (0.3, 0.7, 0.95):
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
            read_image(path)


# Pillow reads a whole WebP or AVIF file to see its size in pixels.
@pytest.mark.parametrize(("suffix", "file_bytes"), [("png", 2**30), ("png", 2**40), ("webp", 2**40), ("avif", 2**40)])
def test_a_file_far_larger_than_its_pixels_is_not_read(suffix: str, file_bytes: int, tmp_path: Path) -> None:
    path = save(tmp_path / f"0.{suffix}", noise(40, 48, 3))
    os.truncate(path, file_bytes)  # Sparse: it takes no room.
    with pytest.raises(DataError, match=r"far more than .* can have"):
        read_image(path)


def test_reading_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path / "0.png")
