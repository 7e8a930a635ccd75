"""Finds the usable images in a folder and its subfolders."""

import gc
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Literal

from pipeline.common.files import readable
from pipeline.data.image_index import FILE, image_facts
from pipeline.data.pictures import SUFFIXES, DataError

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
MADE_BY_RUNS = (
    *({name} for name in ("mlflow.db", FILE, "rate-distortion.png", "comparison.json", "report.html")),
    {"record.json", "metrics.jsonl"},
)
"""Files that mark a folder of runs, curves, a comparison, a report or a stage. The images in it are results."""

logger = logging.getLogger(__name__)

LeftOut = Callable[[Path, list[str]], bool]
"""Whether to leave out a folder with its subfolders, by its path and the names of its files."""


@dataclass(frozen=True)
class Photos:
    """Usable images, in the order of their names.

    `names` are printable, relative to the folder and use `/`. `paths` are text: a million Path objects take twice the
    memory and seconds to make. `pixels` is the total of all images. `skipped` pairs each unusable file with the
    reason; files of other kinds are counted in one entry for the whole folder. `digest` is the SHA-256 (hexadecimal)
    of all names and contents; it changes when an image is added, removed or changed. Tracking records `name` and
    `source` as the data of a run.
    """

    name: str
    source: str
    names: tuple[str, ...]
    paths: tuple[str, ...]
    pixels: int
    skipped: tuple[tuple[str, str], ...]
    digest: str


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Suspend the search for reference cycles, which would scan millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def find_images(folder: Path | None, split: Literal["train", "val"], minimum: int, runs: Path | None = None) -> Photos:
    """Find the usable images in and below a folder; for None, take the packaged photographs.

    Each file is read once; an index in the folder `runs` recognizes it later by its size and times. Folders of runs
    are left out: their images are reconstructions. For training, images with a side shorter than `minimum` pixels
    are skipped. Raises DataError if no usable image is left.
    """
    others: Counter[str] = Counter()
    if folder is None:
        files = sorted((name, str(distribution(wheel).locate_file(name))) for wheel, name in PACKAGED[split])
        name, source = f"packaged-{split}", "photographs in the wheels of scikit-image and scikit-learn"
    else:
        files = sorted(_walk(folder, SUFFIXES, partial(_made_by_runs, folder, runs), others))
        name, source = readable(folder.resolve().name), readable(str(folder.resolve()))
    if folder is None or runs is None:
        found = image_facts(files, Path(), None)
    else:
        found = image_facts(files, folder.resolve(), runs / FILE)

    digest, pixels = hashlib.sha256(), 0
    usable: list[tuple[str, str]] = []
    skipped = [(source, other_kinds(others))] if others else []
    for (relative, path), facts in zip(files, found, strict=True):
        if isinstance(facts, str):
            skipped.append((path, facts))
        elif split == "train" and min(facts.width, facts.height) < minimum:
            skipped.append((path, f"{facts.width}×{facts.height}, smaller than {minimum}×{minimum} pixels"))
        else:
            usable.append((readable(relative), path))
            pixels += facts.width * facts.height
            digest.update(os.fsencode(relative) + f"\0{facts.digest}\n".encode())
    if not usable:
        raise DataError(_nothing_usable(source, split, skipped))
    names, paths = zip(*usable, strict=True)
    return Photos(name, source, names, paths, pixels, tuple(skipped), digest.hexdigest())


def check_folder(folder: Path, split: str) -> None:
    """Raise DataError if a folder does not exist or has no file with an image's suffix."""
    others: Counter[str] = Counter()
    if next(_walk(folder, SUFFIXES, None, others), None) is None:
        source = readable(str(folder.resolve()))
        raise DataError(_nothing_usable(source, split, [(source, other_kinds(others))] if others else []))


def files_below(folder: Path, suffixes: tuple[str, ...]) -> tuple[list[tuple[str, Path]], Counter[str]]:
    """Files with these suffixes in and below a folder, by names relative to it, and numbers of other files by suffix.

    Raises DataError if there is no such folder.
    """
    others: Counter[str] = Counter()
    return sorted((name, Path(path)) for name, path in _walk(folder, suffixes, None, others)), others


def skipped_lines(skipped: Sequence[tuple[str, str]], most: int) -> list[str]:
    """A line for each of the first skipped files, and one with the number of the others."""
    lines = [f"skipped {path}: {reason}" for path, reason in skipped[:most]]
    return [*lines, *([f"… and {len(skipped) - most:,} more"] if len(skipped) > most else [])]


def other_kinds(others: Counter[str]) -> str:
    """The numbers of files that are skipped for their kind, in words."""
    most = [f"{suffix}: {count:,}" for suffix, count in others.most_common(5)]
    more = ", …" if len(others) > len(most) else ""
    return f"{others.total():,} of kinds that are not read ({', '.join(most)}{more})"


def _walk(
    folder: Path, suffixes: tuple[str, ...], left_out: LeftOut | None, others: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Relative names and paths of the files with these suffixes. Others are counted, except hidden ones."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; give a folder of images ({' '.join(suffixes)})")
    for root, folders, files in os.walk(folder, onerror=lambda problem: logger.warning("left out: %s", problem)):
        if left_out is not None and left_out(Path(root), files):
            folders.clear()
            continue
        others.update("links to folders" for name in folders if os.path.islink(f"{root}/{name}"))  # noqa: PTH114
        below = Path(root).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        for file in files:
            if file.lower().endswith(suffixes):
                yield prefix + file, f"{root}/{file}"
            elif file[0] != ".":
                others[readable(os.path.splitext(file)[1].lower()) or "no suffix"] += 1  # noqa: PTH122


def _made_by_runs(images: Path, runs: Path | None, folder: Path, files: list[str]) -> bool:
    """Whether `folder` holds results of runs. Raises DataError if it is the folder of images itself."""
    marked = any(files_of_runs.issubset(files) for files_of_runs in MADE_BY_RUNS)
    found = marked or (runs is not None and folder.resolve() == runs.resolve())
    if found and folder == images:
        raise DataError(f"{images}: this is a folder of runs, and its images are reconstructions; give another folder")
    return found


def _nothing_usable(source: str, split: str, skipped: list[tuple[str, str]]) -> str:
    lines = [
        f"{source}: no usable image for {split}; looked for {' '.join(SUFFIXES)} here and below",
        *(f"  {line}" for line in skipped_lines(skipped, 5)),
        "Give another folder (data.train, data.val), or null for the packaged photographs.",
    ]
    return "\n".join(lines)
