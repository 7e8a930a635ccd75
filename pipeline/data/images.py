"""Photographs on disk: finds the usable ones in a folder."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal, overload

from pipeline.common.files import readable
from pipeline.data.image_index import (
    FILE,
    FileStamp,
    ImageFacts,
    ImageIndex,
    digests,
    remembered,
    without_garbage_collection,
)
from pipeline.data.pictures import SUFFIXES, DataError, file_status, opened

# The wheels of scikit-image and scikit-learn contain these, so no network is needed.
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photos:
    """Usable images, in the order of their names.

    `names` are printable, relative to the folder and use `/`. `pixels` is the total of all images. `skipped` pairs
    each unusable file with the reason. `digest` is the SHA-256 (hexadecimal) of all names and contents; it changes
    when an image is added, removed or changed. Tracking records `name` and `source` as the data of a run.
    """

    name: str
    source: str
    names: tuple[str, ...]
    paths: Sequence[Path]
    pixels: int
    skipped: tuple[tuple[Path, str], ...]
    digest: str


@dataclass(frozen=True)
class Paths(Sequence[Path]):
    """A sequence of paths, stored as text. A million take less than half the memory of Path objects, and 4 s less."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> "Paths": ...

    def __getitem__(self, index: int | slice) -> "Path | Paths":
        return Paths(self.texts[index]) if isinstance(index, slice) else Path(self.texts[index])


@without_garbage_collection()
def find_images(folder: Path | None, split: Literal["train", "val"], minimum: int, runs: Path | None = None) -> Photos:
    """Find the usable images in and below a folder; for None, take the packaged photographs.

    Each file is read once; an index in the folder `runs` recognizes it later by its size and times. Folders of runs
    are left out: their images are reconstructions. For training, images with a side shorter than `minimum` pixels
    are skipped. Raises DataError if no usable image is left.
    """
    if folder is None:
        found = sorted((name, str(distribution(wheel).locate_file(name))) for wheel, name in PACKAGED[split])
        name, source = f"packaged-{split}", "photographs in the wheels of scikit-image and scikit-learn"
    else:
        found = sorted(_names_below(folder, SUFFIXES, partial(_is_runs_folder, folder, runs)))
        name, source = readable(folder.resolve().name), readable(str(folder.resolve()))

    index = ImageIndex(runs / FILE if runs and folder else None, folder.resolve() if folder else Path())
    with index.alone():
        looked_at = _look(found, index)
    digest, pixels = hashlib.sha256(), 0
    usable: list[tuple[str, str]] = []
    skipped: list[tuple[Path, str]] = []
    for relative, path, facts in looked_at:
        problem = facts if isinstance(facts, str) else ""
        if not isinstance(facts, str) and split == "train" and min(facts.width, facts.height) < minimum:
            problem = f"{facts.width}×{facts.height}, smaller than {minimum}×{minimum} pixels"
        if problem or isinstance(facts, str):
            skipped.append((Path(path), problem))
            continue
        usable.append((readable(relative), path))
        pixels += facts.width * facts.height
        digest.update(os.fsencode(relative) + f"\0{facts.digest}\n".encode())
    if not usable:
        raise DataError(_nothing_usable(source, split, skipped))
    names, paths = zip(*usable, strict=True)
    return Photos(name, source, names, Paths(paths), pixels, tuple(skipped), digest.hexdigest())


def _look(found: list[tuple[str, str]], index: ImageIndex) -> list[tuple[str, str, ImageFacts | str]]:
    """Facts about each file, or the reason why it cannot be used; new facts are added to the index."""
    known = index.known()
    looked_at: list[tuple[str, str, ImageFacts | str]] = []
    new: list[tuple[int, FileStamp, tuple[int, int]]] = []
    for relative, path in found:
        facts: ImageFacts | str | None = remembered(known.get(relative), path)
        if facts is None:
            facts = "not read"
            try:
                stamp = FileStamp.of(file_status(Path(path)))
                with opened(Path(path)) as picture:
                    new.append((len(looked_at), stamp, picture.size))
            except DataError as problem:
                facts = str(problem).removeprefix(f"{path}: ")
        looked_at.append((relative, path, facts))
    paths, sizes = [Path(looked_at[place][1]) for place, _, _ in new], [stamp.size for _, stamp, _ in new]
    for (place, _, size), digest in zip(new, digests(paths, sizes), strict=True):
        read = str(digest.strerror) if isinstance(digest, OSError) else ImageFacts(*size, digest)
        looked_at[place] = (*looked_at[place][:2], read)
    index.remember(
        (looked_at[place][0], stamp, facts)
        for place, stamp, _ in new
        if isinstance(facts := looked_at[place][2], ImageFacts)
    )
    return looked_at


def check_folder(folder: Path, split: str) -> None:
    """Raise DataError if a folder does not exist or has no file with an image's suffix."""
    if next(_names_below(folder, SUFFIXES, None), None) is None:
        raise DataError(_nothing_usable(readable(str(folder.resolve())), split, []))


def files_below(
    folder: Path, suffixes: tuple[str, ...] = SUFFIXES, left_out: Callable[[Path, list[str]], bool] | None = None
) -> list[tuple[str, Path]]:
    """Files with these suffixes in and below a folder, each with its name relative to it; raises DataError.

    `left_out` gets the path and file names of each folder and returns whether to skip it and its subfolders.
    """
    return [(name, Path(path)) for name, path in _names_below(folder, suffixes, left_out)]


def _names_below(
    folder: Path, suffixes: tuple[str, ...], left_out: Callable[[Path, list[str]], bool] | None
) -> Iterator[tuple[str, str]]:
    """As `files_below`, one by one, with paths as text."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; give a folder of images ({' '.join(suffixes)})")
    for root, folders, files in os.walk(folder, onerror=lambda problem: logger.warning("left out: %s", problem)):
        if left_out is not None and left_out(Path(root), files):
            folders.clear()
            continue
        below = Path(root).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        yield from ((prefix + file, f"{root}/{file}") for file in files if file.lower().endswith(suffixes))


def _is_runs_folder(images: Path, runs: Path | None, folder: Path, files: list[str]) -> bool:
    """Whether `folder` is a folder of runs; raises DataError if it is the folder of images itself."""
    found = "mlflow.db" in files or (runs is not None and folder.resolve() == runs.resolve())
    if found and folder == images:
        raise DataError(f"{images}: this is a folder of runs, and its images are reconstructions; give another folder")
    return found


def _nothing_usable(source: str, split: str, skipped: list[tuple[Path, str]]) -> str:
    lines = [
        f"{source}: no usable image for {split}; looked for {' '.join(SUFFIXES)} here and below",
        *(f"  skipped {path}: {reason}" for path, reason in skipped[:5]),
        *([f"  … and {len(skipped) - 5} more"] if len(skipped) > 5 else []),
        "Give another folder (data.train, data.val), or null for the packaged photographs.",
    ]
    return "\n".join(lines)
