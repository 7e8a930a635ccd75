"""Atomic file writes: a reader sees either the old content or the new, never a part of it."""

import errno
import hashlib
import json
import os
import stat
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.common.errors import UserError
from pipeline.common.fault_injection import fault


class FileError(UserError):
    """A file is missing or damaged, or cannot be written or locked. A failed write keeps the old content."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; it replaces `path` once it is complete and on disk. Raises FileError.

    The temporary file is always new and has a name of its own. Of two writers at once, the last one wins.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        if not stat.S_ISREG(partial.lstat().st_mode):
            raise OSError(errno.ELOOP, f"{partial.name} was replaced by another program")
        partial.chmod(mode)  # safetensors ignores the umask and makes it readable by the owner only.
        flush(partial)
        fault("write.partial")
        partial.replace(path)
        fault("write.renamed")
        flush(path.parent)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written: {error.strerror or error}.\n"
            "  What was saved before is kept. Fix the cause, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8; raises FileError."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; raises FileError."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def free_name(path: Path, rename: Callable[[Path], object]) -> Path:
    """Call `rename` with the first free name: `path`, or `path` with a number appended. Returns that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    rename(free)
    return free


def check_regular(path: Path, error: type[UserError] = FileError) -> os.stat_result:
    """Return a file's status. Raises `error` for a folder, pipe or device: reading a pipe could block forever."""
    try:
        status = path.stat()
    except OSError as problem:
        what = "no such file" if isinstance(problem, FileNotFoundError) else problem.strerror
        raise error(f"{path}: {what}") from problem
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: {'a folder, not a file' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    return status


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open one of the program's own files without blocking on a pipe; raises OSError for a symbolic link."""
    own = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | own, 0o666))


class OwnFolder:
    """A folder in which this process works. It notices if the folder is moved, deleted or replaced."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None
        """An open descriptor: as long as there is one, no new folder gets the same inode."""

    def check(self) -> None:
        """Raise FileError unless the path names the folder that it named in the first call."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                weakref.finalize(self, os.close, self._descriptor)
            if os.path.samestat(os.fstat(self._descriptor), self.path.stat()):
                return
            problem = "another folder was put in its place"
        except OSError as error:
            problem = error.strerror or str(error)
        raise FileError(f"{self.path}: {problem}. If it was moved, run the same command in its new place")


def readable(name: str) -> str:
    """A file's name as printable text, with bytes that are not UTF-8 written as `\\xff`."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def flush(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; raises FileError if it is missing or not a regular file."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
