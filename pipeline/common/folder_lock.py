"""One run at a time in a folder, and one process at a time at a short piece of work."""

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

_WORKING = threading.Lock()
"""A lock of the system's keeps processes apart, and not the threads of one."""


class FolderInUse(UserError):
    """Another process works in the folder; the message says which."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while the context lasts; raises FolderInUse, naming the holder.

    The system lets go of the lock when its process ends, however it ends, and data workers do not inherit it. Raises
    FileError where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open_own(folder / "lock", "a+") as file:
        try:
            _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise FolderInUse(
                f"{folder}: {file.read().strip() or 'another process'} is using this folder; "
                "wait for it to end, or stop it, first"
            ) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
        file.flush()
        yield


@contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Wait until no other process or thread is inside this context with the same lock file; raises FileError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _WORKING, open_own(path, "a+") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], operation: int) -> None:
    try:
        fcntl.lockf(file, operation)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        raise FileError(
            f"{file.name}: cannot be locked: {error.strerror}. The file system may have no locks; "
            "choose another folder with --runs"
        ) from error
