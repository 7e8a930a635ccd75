"""The journal of an outbox: what its lines say, and how they are read, appended and counted as sent."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.common.contracts import contract_of, parse_contract
from pipeline.common.files import FileError, check_regular, open_own
from pipeline.tracking.store import EndState


@dataclass(frozen=True)
class Open:
    """Arguments of an entry that opens a run: its name, the key of the run that it is nested in, and its tags."""

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
    step: int


@dataclass(frozen=True)
class Artifact:
    """Arguments of an entry that keeps a file: its name below `files/`, and the artifact folder that it goes to."""

    name: str
    folder: str | None


@dataclass(frozen=True)
class End:
    """Arguments of an entry that closes a run."""

    state: EndState


ACTIONS: dict[str, type[Any]] = {
    "open": Open, "parameters": Values, "tags": Values, "dataset": Dataset, "metrics": Metrics,
    "artifact": Artifact, "end": End,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A line of the journal: what to do with which run, and when that was asked for, in ms since 1970."""

    run: str
    action: Literal["open", "parameters", "tags", "dataset", "metrics", "artifact", "end"]
    time: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the journal, the offset where it ends, and its entry: None with a `problem` where it is damaged."""

    text: bytes
    end: int
    entry: Entry | None
    problem: str = ""


def make_folder(folder: Path) -> None:
    """Make an outbox's folder; raises FileError where it or a file of its own is a link, or no plain file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, folder / "files"):
        if path.is_symlink():
            raise FileError(
                f"{path}: a link, which is not followed; move it away, or send its journal from its own place"
            )
    for path in (folder / "journal.jsonl", folder / "sent", folder / "set-aside.jsonl"):
        if path.is_symlink():
            raise FileError(f"{path}: a link, which is not followed; move it away")
        if path.exists():
            check_regular(path)


def append(path: Path, line: bytes) -> None:
    """Add a line to a file on disk."""
    with open_own(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def parse(text: bytes, source: str) -> Entry:
    """The entry in a line, its arguments those of its action; raises FileError, naming `source`."""
    entry = parse_contract(Entry, text, source)
    arguments = contract_of(ACTIONS[entry.action], entry.arguments, source)
    return replace(entry, arguments=vars(arguments))


def lines(journal: Path, start: int) -> Iterator[Line]:
    """The whole lines from an offset on."""
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
    """How much of the journal is noted as sent; 0 where the note does not fit it."""
    try:
        sent = int(path.read_text())
        return sent if journal.read_bytes()[:sent].endswith(b"\n") and sent <= journal.stat().st_size else 0
    except (OSError, ValueError):
        return 0


def cut_torn_line(journal: Path) -> int:
    """Cut off a last line that a kill left unfinished; returns the length in bytes."""
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
    return whole
