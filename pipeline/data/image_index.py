"""Sizes and digests of image files, cached beside the runs. A file is read again only if its size or times change."""

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.files import FileError
from pipeline.common.folder_lock import alone_at
from pipeline.data.pictures import DataError, opened

FILE = "images.db"
"""Name of the cache, a database, in the folder of runs."""
SETTLED = 2 * 10**9
"""Nanoseconds without a change before a file is cached. Two changes within one clock tick can have the same time."""
READERS = 8
"""Threads that read and hash files; hashing releases Python's global lock."""
WORTH_A_LINE = 2**28
"""A message is logged if more bytes than this must be read."""

TABLE = (
    "CREATE TABLE IF NOT EXISTS images (folder BLOB, name BLOB, size INTEGER, modified INTEGER, changed INTEGER, "
    "width INTEGER, height INTEGER, digest TEXT, PRIMARY KEY (folder, name)) WITHOUT ROWID"
)
SELECT = "SELECT name, size, modified, changed, width, height, digest FROM images WHERE folder = ?"
INSERT = "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)"

logger = logging.getLogger(__name__)

Rows = list[tuple[Any, ...]]
Stamp = tuple[int, int, int]
"""A file's size in bytes, and the times when its content and its status changed, in ns since 1970."""


class ImageFacts(NamedTuple):
    """An image's width and height in pixels, and the SHA-256 (hexadecimal) of its file."""

    width: int
    height: int
    digest: str


def image_facts(files: Sequence[tuple[str, str]], folder: Path, database: Path | None) -> list[ImageFacts | str]:
    """Facts about each file, or the reason why it cannot be used. A file is given by its name in `folder` and its path.

    Facts are taken from the cache `database`, and added to it. For None, nothing is cached. If the cache cannot be
    used, all files are read.
    """
    encoded = os.fsencode(folder)
    with _alone(database):
        # Rows instead of objects, and no Path for each file: for a million images, these would take seconds.
        rows = _in_database(database, lambda connection: connection.execute(SELECT, (encoded,)).fetchall())
        known = {os.fsdecode(row[0]): row for row in rows}
        facts: list[ImageFacts | str] = []
        unread: dict[int, Stamp | None] = {}
        for place, (name, path) in enumerate(files):
            row, stamp = known.get(name, ()), _stamp(path)
            if row[1:4] == stamp:
                facts.append(ImageFacts._make(row[4:]))
            else:
                facts.append("")
                unread[place] = stamp
        file_bytes = sum(stamp[0] for stamp in unread.values() if stamp)
        if file_bytes > WORTH_A_LINE:
            text = "reading %s images once to compute their digests (%.1f GB)"
            logger.warning(text, f"{len(unread):,}", file_bytes / 1e9)
        with ThreadPoolExecutor(READERS) as pool:
            read = pool.map(_read, [Path(files[place][1]) for place in unread])
        settled, rows = time.time_ns() - SETTLED, []
        for (place, stamp), found in zip(unread.items(), read, strict=True):
            facts[place] = found
            if stamp and isinstance(found, ImageFacts) and max(stamp[1:]) < settled:
                rows.append((encoded, os.fsencode(files[place][0]), *stamp, *found))
        if rows:
            _in_database(database, lambda connection: connection.executemany(INSERT, rows).fetchall())
    return facts


def _stamp(path: str) -> Stamp | None:
    """A file's stamp; None if it does not exist."""
    try:
        status = os.stat(path)  # noqa: PTH116 – a Path takes longer than the call
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> ImageFacts | str:
    try:
        with opened(path) as picture, path.open("rb") as file:
            return ImageFacts(*picture.size, hashlib.file_digest(file, "sha256").hexdigest())
    except DataError as problem:
        return str(problem).removeprefix(f"{path}: ")


@contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Lock the cache, so that other processes wait for its entries instead of reading the same files."""
    with ExitStack() as exits:
        if database is not None and database.parent.is_dir():
            with suppress(FileError, OSError):  # Not writable: each process reads the files itself.
                exits.enter_context(alone_at(database.with_suffix(".lock")))
        yield


def _in_database(database: Path | None, work: Callable[[sqlite3.Connection], Rows]) -> Rows:
    """The rows of `work`, or [] if the database cannot be used. A damaged database is replaced."""
    if database is None or not database.parent.is_dir():
        return []
    for _ in range(2):
        try:
            with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
                connection.execute(TABLE)
                return work(connection)
        except sqlite3.OperationalError:  # Not writable, or locked for too long.
            return []
        except sqlite3.DatabaseError:  # Damaged, or not a database.
            database.unlink()
    return []
