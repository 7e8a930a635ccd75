"""The journal of an outbox: the entries in its lines, and how to read, append and count them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.common.contracts import Long, contract_of, parse_contract
from pipeline.common.files import FileError, check_regular, open_own
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.store import EndState


@dataclass(frozen=True)
class Open:
    """Arguments of an entry that opens a run. `parent` is the key of the run that contains it."""

    name: str
    parent: str | None
    tags: dict[str, str]


@dataclass(frozen=True)
class Values:
    """Arguments of an entry that logs parameters or tags."""

    values: dict[str, str]


@dataclass(frozen=True)
class Dataset:
    """Arguments of an entry that logs a set of images."""

    name: str
    digest: str
    source: str
    profile: str
    context: str


@dataclass(frozen=True)
class Metrics:
    """Arguments of an entry that logs metrics at a step."""

    values: dict[str, float]
    step: Long


@dataclass(frozen=True)
class Samples:
    """Arguments of an entry that logs metrics at their next steps. With `repeated`, equal values are logged too."""

    values: dict[str, float]
    repeated: bool


@dataclass(frozen=True)
class Image:
    """Arguments of an entry that logs a picture: the file's name below `files/`, and its key and step in MLflow."""

    name: str
    key: str
    step: Long


@dataclass(frozen=True)
class Table:
    """Arguments of an entry that logs a table as the artifact `path`."""

    path: str
    columns: list[str]
    rows: list[list[str | int | float | None]]


@dataclass(frozen=True)
class Model:
    """Arguments of an entry that registers a model: its folder's name below `files/`, and its `ModelFacts`."""

    name: str
    facts: ModelFacts


@dataclass(frozen=True)
class Artifact:
    """Arguments of an entry that logs an artifact: the file's name below `files/`, and its artifact folder."""

    name: str
    folder: str | None


@dataclass(frozen=True)
class End:
    """Arguments of an entry that closes a run."""

    state: EndState


ACTIONS: dict[str, type[Any]] = {
    "open": Open, "parameters": Values, "tags": Values, "dataset": Dataset, "metrics": Metrics,
    "samples": Samples, "artifact": Artifact, "image": Image, "table": Table, "model": Model, "end": End,
}  # fmt: skip
WITH_FILES = ("artifact", "image", "model")
"""Actions whose `name` is a file or folder below `files/`, which is deleted once the entry is sent."""


@dataclass(frozen=True)
class Entry:
    """One log entry: an action on a run. `time` is when it was logged, in ms since 1970."""

    run: str
    action: Literal[
        "open", "parameters", "tags", "dataset", "metrics", "samples", "artifact", "image", "table", "model", "end"
    ]
    time: Long
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the journal and the offset of its end. A damaged line has a `problem` and no entry."""

    text: bytes
    end: int
    entry: Entry | None
    problem: str = ""


def make_folder(folder: Path) -> None:
    """Make an outbox's folder. Raises FileError if the folder or one of its files is a link or not a plain file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, folder / "files"):
        if path.is_symlink():
            raise FileError(f"{path}: this is a link, and links are not followed; move it away, or use the real folder")
    for path in (folder / "journal.jsonl", folder / "sent", folder / "set-aside.jsonl"):
        if path.is_symlink():
            raise FileError(f"{path}: this is a link, and links are not followed; move it away")
        if path.exists():
            check_regular(path)


def append(path: Path, line: bytes) -> None:
    """Append a line to a file and flush it to the disk."""
    with open_own(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def parse(text: bytes, source: str) -> Entry:
    """The entry in a line, with its arguments checked. Raises FileError, naming `source`."""
    entry = parse_contract(Entry, text, source)
    arguments = contract_of(ACTIONS[entry.action], entry.arguments, source)
    return replace(entry, arguments=vars(arguments))


def lines(journal: Path, start: int) -> Iterator[Line]:
    """The complete lines after an offset."""
    if not journal.exists():
        return
    with open_own(journal, "rb") as file:
        file.seek(start)
        while (text := file.readline()).endswith(b"\n"):
            try:
                yield Line(text, file.tell(), parse(text, "line"))
            except FileError as error:
                number = journal.read_bytes()[: file.tell()].count(b"\n")
                yield Line(text, file.tell(), None, str(error).replace("line", f"line {number}", 1))


def offset(path: Path, journal: Path) -> int:
    """Number of bytes of the journal that were sent; 0 if the file `path` does not fit the journal."""
    try:
        sent = int(path.read_text())
        return sent if journal.read_bytes()[:sent].endswith(b"\n") and sent <= journal.stat().st_size else 0
    except (OSError, ValueError):
        return 0


def cut_torn_line(journal: Path) -> int:
    """Remove an incomplete last line. Returns the length of the journal in bytes."""
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
    return whole
