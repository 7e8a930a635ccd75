"""Files written whole: a reader finds the new content or the old, never a part."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.fault_injection import fault


class FileError(UserError):
    """A file that cannot be written, where what it held before is kept; or a journal that somebody damaged."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once it is whole and on disk; raises FileError."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
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
