"""Locks: one run at a time in a folder, and one process at a time in a short critical section."""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.common.errors import UserError
from pipeline.common.files import FileError, open_own

_THREADS: dict[Path, threading.Lock] = {}
"""Exclude other threads, by lock file; a file lock excludes only other processes."""


class FolderInUse(UserError):
    """Another process is using the folder; the message names it."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder for the duration of the context; raises FolderInUse, naming the holder.

    The system releases the lock when the process ends for any reason. Data workers do not inherit it. Raises
    FileError if the file system does not support locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_own(folder / "lock", "a+") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise FolderInUse(
                f"{folder}: {file.read().strip() or 'another process'} is using this folder; "
                "wait for it to end, or stop it"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
        file.flush()
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    try:
        with (folder / "lock").open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # There is no lock, or the file system has none.
        return False


@contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Wait until no other process or thread holds the lock file `path`, then hold it; raises FileError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _THREADS.setdefault(path.absolute(), threading.Lock()), open_own(path, "a+") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], operation: int) -> None:
    try:
        fcntl.lockf(file, operation)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        raise FileError(
            f"{file.name}: cannot be locked: {error.strerror}. The file system may not support locks; "
            "choose another folder with --runs"
        ) from error
