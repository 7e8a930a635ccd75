"""Files written whole: a reader finds the new content or the old, never a part."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pipeline.common.errors import UserError
from pipeline.common.fault_injection import fault


class FileError(UserError):
    """A file that cannot be written, where what it held before is kept; or a journal that somebody damaged."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole and on disk; raises FileError.

    It is made anew: whatever bore its name, such as a link to another file, is removed and not written to.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield partial
        if not stat.S_ISREG(partial.lstat().st_mode):
            raise OSError(errno.ELOOP, f"{partial.name} was replaced by another program")
        partial.chmod(mode)  # safetensors lets only the owner read it, whatever the umask says.
        flush(partial)
        fault("write.partial")
        partial.replace(path)
        fault("write.renamed")
        flush(path.parent)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written: {error.strerror or error}.\n"
            "  What was saved before is kept. Mend that, then give the same command again."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the whole of it or what was there before; raises FileError."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def free_name(path: Path, rename: Callable[[Path], object]) -> Path:
    """Give something a name that nothing has yet: `path`, or the same with a number; returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    rename(free)
    return free


def check_regular(path: Path, error: type[UserError] = FileError) -> os.stat_result:
    """Status of a file; raises `error` for a folder, a pipe or a device, which would be waited for without end."""
    try:
        status = path.stat()
    except OSError as problem:
        what = "no such file" if isinstance(problem, FileNotFoundError) else problem.strerror
        raise error(f"{path}: {what}") from problem
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: {'a folder, not a file' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
    return status


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open a file of the program's own: raises OSError for a symbolic link in its place, and waits for no pipe."""
    return open(path, mode, opener=_not_through_links)


def _not_through_links(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def readable(name: str) -> str:
    """A file's name with what is not UTF-8 in it written as `\\xff`: it can be printed, and kept as text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def text_digest(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
