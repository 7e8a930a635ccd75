"""A cache of image sizes and digests, kept beside the runs. A file is read again if its size or times change."""

import gc
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.common.files import FileError
from pipeline.common.folder_lock import alone_at

FILE = "images.db"
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

logger = logging.getLogger(__name__)


class FileStamp(NamedTuple):
    """A file's size in bytes, and the times when its content and status changed, in ns since 1970."""

    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """Take the stamp from a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class ImageFacts(NamedTuple):
    """An image's width and height in pixels, and the SHA-256 (hexadecimal) of its file."""

    width: int
    height: int
    digest: str


class ImageIndex:
    """The cached facts about one folder's files, in the database `path`; without a path, nothing is cached."""

    def __init__(self, path: Path | None, folder: Path):
        self.path, self._folder = path, os.fsencode(folder)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the index, so that other processes wait for its entries instead of reading the same files."""
        with ExitStack() as exits:
            if self.path is not None and self.path.parent.is_dir():
                with suppress(FileError, OSError):  # Not writable: each process reads the files itself.
                    exits.enter_context(alone_at(self.path.with_suffix(".lock")))
            yield

    def known(self) -> dict[str, tuple[Any, ...]]:
        """All entries, by the file's name relative to the folder. `remembered` reads the facts in an entry.

        Entries are rows of the database, because objects of a million images would take seconds to make.
        """
        query = "SELECT name, size, modified, changed, width, height, digest FROM images WHERE folder = ?"
        rows = self._in_database(lambda database: database.execute(query, (self._folder,)).fetchall())
        return {os.fsdecode(row[0]): row for row in rows}

    def remember(self, found: Iterable[tuple[str, FileStamp, ImageFacts]]) -> None:
        """Store entries, except those of files that changed just now."""
        settled = time.time_ns() - SETTLED
        rows = [
            (self._folder, os.fsencode(name), *stamp, *facts)
            for name, stamp, facts in found
            if max(stamp.modified, stamp.changed) < settled
        ]
        if rows:
            statement = "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            self._in_database(lambda database: database.executemany(statement, rows).fetchall())

    def _in_database(self, work: Callable[[sqlite3.Connection], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        """Return the rows of `work`, or [] if the database is unusable: it is only a cache."""
        if self.path is None or not self.path.parent.is_dir():
            return []
        for _ in range(2):
            try:
                with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                    database.execute(TABLE)
                    return work(database)
            except sqlite3.OperationalError:  # Not writable, or locked for too long.
                return []
            except sqlite3.DatabaseError:  # Damaged, or not a database.
                self.path.unlink()
        return []


def remembered(entry: tuple[Any, ...] | None, path: str) -> ImageFacts | None:
    """The facts in an entry of the index. None if there is no entry or the file has changed."""
    if entry is None:
        return None
    try:
        status = os.stat(path)  # noqa: PTH116 – a Path takes longer than the call
    except OSError:
        return None
    # Without a FileStamp, which would take longer than the comparison.
    same = entry[1:4] == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ImageFacts._make(entry[4:]) if same else None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Make millions of objects without looking again and again for cycles between them. There are none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def digests(paths: Sequence[Path], sizes: Sequence[int]) -> Iterator[str | OSError]:
    """SHA-256 (hexadecimal) of each file, in order, or the error if a file cannot be read."""
    if sum(sizes) > WORTH_A_LINE:
        logger.warning("reading %s images once to compute their digests (%.1f GB)", f"{len(paths):,}", sum(sizes) / 1e9)
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(_digest, paths)


def _digest(path: Path) -> str | OSError:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error
