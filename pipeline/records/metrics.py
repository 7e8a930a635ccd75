"""The metrics of a stage: `metrics.jsonl` in its folder, one line a report."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from pipeline.common.contracts import Long, parse_contract
from pipeline.common.files import FileError, OwnFolder, open_own, replacing

FILE = "metrics.jsonl"
SYSTEM = "system.jsonl"
"""Use of processor, memory, disk, network and GPU. Its step is the number of the line."""
History = list[tuple[int, float]]
"""(step of the stage, value) pairs of a metric."""


@dataclass(frozen=True)
class Report:
    """Metrics at a step of the stage. `time` is in ms since 1970."""

    step: Long
    time: Long
    values: dict[str, float]


class MetricsLog:
    """Appends reports to a file. Without a path it writes nothing, as in all processes except the first.

    A report of the same step and name is written once: a resume cuts the lines after its state with `cut`.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.folder = OwnFolder(path.parent) if path is not None else None
        self.lines = count_lines(path) if path is not None else 0
        """Number of lines in the file."""

    def check(self) -> None:
        """Raise FileError if the folder was moved, deleted or replaced while this log was in use."""
        if self.folder is not None:
            self.folder.check()

    def append(self, values: Mapping[str, float], step: int) -> None:
        """Write a line. Raises FileError, such as on a full disk; the file then has the lines before."""
        if self.path is None:
            return
        self.check()
        line = json.dumps(asdict(Report(step, int(1000 * time.time()), dict(values)))).encode() + b"\n"
        try:
            with open_own(self.path, "ab") as file:
                size = file.tell()
                try:
                    file.write(line)
                    file.flush()
                except OSError:
                    os.truncate(self.path, size)
                    raise
        except OSError as error:
            raise FileError(
                f"{self.path}: cannot be written: {error.strerror}; the last saved state is kept"
            ) from error
        self.lines += 1

    def cut(self, lines: int) -> None:
        """Keep the first `lines` lines. Raises FileError."""
        if self.path is None or not self.path.exists():
            return
        kept = _whole_lines(self.path)[:lines]
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(kept))
        self.lines = len(kept)


def read_reports(path: Path, first: int = 0, last: int | None = None) -> Iterator[Report]:
    """The reports in lines `first` to `last` (not included) of a file; none if it is missing.

    An unfinished last line is left out. Raises FileError, naming file and line, for any other damage.
    """
    for number, line in enumerate(islice(_whole_lines(path), first, last), first + 1):
        yield parse_contract(Report, line, f"{path}:{number}")


def count_lines(path: Path) -> int:
    """Number of whole lines in a file; 0 if it is missing."""
    return len(_whole_lines(path))


def read_history(folder: Path) -> dict[str, History]:
    """Every metric of a stage's folder, by name, in the order of its lines. Raises FileError."""
    found: dict[str, History] = {}
    for report in read_reports(folder / FILE):
        for key, value in report.values.items():
            found.setdefault(key, []).append((report.step, value))
    return found


def _whole_lines(path: Path) -> list[bytes]:
    try:
        with open_own(path, "rb") as file:
            return [line for line in file if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
