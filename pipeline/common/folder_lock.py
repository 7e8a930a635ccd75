"""One run at a time in a folder."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.common.errors import UserError


class FolderInUse(UserError):
    """Another process works in the folder; the message says which."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while the context lasts; raises FolderInUse, naming the holder.

    The system lets go of the lock when its process ends, however it ends, and data workers do not inherit it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
