"""Plans which image files become which `.hpcm` files, and back. Without PyTorch, so mistakes are reported at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.images import files_below, other_kinds
from pipeline.data.pictures import SUFFIXES, DataError

SUFFIX = ".hpcm"
COMPRESSION = (SUFFIXES, SUFFIX)
DECOMPRESSION = ((SUFFIX,), ".png")
"""Suffixes to read, and the suffix to write."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversion:
    """A file to read and a file to write; `name` is the path of the target relative to the output folder."""

    source: Path
    target: Path
    name: str


def find(sources: Sequence[Path], suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The given files, and the files with these suffixes in and below the given folders, with relative names.

    Raises DataError for a source that does not exist and for a folder without such files.
    """
    found = []
    for source in sources:
        if source.is_dir():
            below, others = files_below(source, suffixes)
            if not below:
                raise DataError(f"{source}: no files with the suffix {' '.join(suffixes)} in or below this folder")
            for suffix in (*SUFFIXES, SUFFIX):
                del others[suffix]  # Pictures and their coded files may lie in one folder.
            if others:
                logger.warning("%s: skipped %s", source, other_kinds(others))
            found += below
        elif source.is_file():
            found.append((source.name, source))
        else:
            what = "not a regular file" if source.exists() else "no such file or folder"
            raise DataError(f"{source}: {what}")
    return found


def plan(
    sources: Sequence[Path], output: Path | None, suffixes: tuple[tuple[str, ...], str], overwrite: bool
) -> list[Conversion]:
    """Plan the files to write: beside each source, in the folder `output` (created if missing), or the file `output`.

    `suffixes` is `COMPRESSION` or `DECOMPRESSION`. `output` is a file if there is one source file and `output` has a
    suffix. Raises DataError for an invalid `output`, if two conversions have the same target, and, unless
    `overwrite`, if a target exists.
    """
    read, written = suffixes
    found = find(sources, read)
    if output and output.suffix and not output.is_dir() and len(sources) == 1 and not sources[0].is_dir():
        if written == SUFFIX != output.suffix.lower():
            raise DataError(
                f"{output}: a coded image needs the suffix {SUFFIX}; if this should be a folder, create it first"
            )
        conversions = [Conversion(found[0][1], output, output.name)]
    elif output and output.suffix.lower() == written and not output.is_dir():
        raise DataError(f"{output}: this names one file, but there are {len(found)} to write; give a folder")
    else:
        names = [(path, Path(name).with_suffix(written)) for name, path in found]
        beside = [(path, output / name if output else path.with_name(name.name), name) for path, name in names]
        conversions = [Conversion(path, target, name.as_posix()) for path, target, name in beside]
    writers: dict[Path, Path] = {}
    for conversion in conversions:
        target = conversion.target
        if target in writers:
            raise DataError(f"{target}: both {writers[target]} and {conversion.source} would be written there")
        if target.exists() and not overwrite:
            raise DataError(f"{target}: exists; --overwrite replaces it")
        writers[target] = conversion.source
    for folder in {target.parent for target in writers}:
        folder.mkdir(parents=True, exist_ok=True)  # If this is not allowed, it fails before the work.
    return conversions
