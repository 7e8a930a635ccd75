"""A queue of log entries on disk: training neither waits for MLflow nor fails because of it.

A run logs by appending an entry to a journal. One thread sends the entries in order, and counts an entry as sent when
the store shows it. After a kill, some entries may be sent twice. StoredRun then checks what the store already has. A
metric keeps its original time, so that a second copy changes nothing. Artifacts are linked or copied into `files/`
beside the journal. The outbox reads and deletes files only there, whatever the journal contains.
"""

import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.common.errors import UserError
from pipeline.common.fault_injection import fault
from pipeline.common.files import FileError, readable
from pipeline.tracking import journal
from pipeline.tracking.journal import WITH_FILES, Entry, Line
from pipeline.tracking.outbox_run import OutboxRun
from pipeline.tracking.store import EntryError, Run, Store, brief
from pipeline.tracking.stored_run import StoredRun, open_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE = 30.0
"""Seconds that `Outbox.close` waits for the remaining entries to be sent."""
LONGEST_PAUSE = 30.0
"""Longest pause in seconds between attempts to reach a store that does not answer."""
BATCH = 64
"""Number of entries sent between two checks that the store shows them."""


class Outbox:
    """The journal of a chain and the thread that sends it. `note` is called when sending fails and recovers."""

    def __init__(self, folder: Path, store: Store, note: Callable[[str], None] = lambda line: None):
        # Not in the thread: a data worker forked during the import would deadlock on the import lock.
        import mlflow  # noqa: F401

        self.folder, self.store, self.note = folder, store, note
        self.path, self.sent_path, self.set_aside = (
            folder / name for name in ("journal.jsonl", "sent", "set-aside.jsonl")
        )
        journal.make_folder(folder)
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._size = journal.cut_torn_line(self.path)
        self._sent = journal.offset(self.sent_path, self.path)
        self._opened: dict[str, dict[str, Any]] = {}
        self.last_step: dict[tuple[str, str], int] = {}
        """The last step logged for each (run, metric) in the journal."""
        for line in journal.lines(self.path, 0):
            if line.entry is not None:
                self._remember(line.entry)
        self._client: MlflowClient | None = None
        self._runs: dict[str, StoredRun] = {}
        self._rejected: int | None = None
        """Offset of the end of the entry that MLflow rejected last."""
        self._aside: set[int] = set()
        """Offsets of the ends of the entries that were set aside."""
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._thread.start()

    def run(self, key: str, name: str, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """Open or reopen the run with this key."""
        run = OutboxRun(self, key)
        run.queue("open", name=name, parent=parent.key if parent else None, tags=dict(tags or {}))
        return run

    @property
    def waiting(self) -> int:
        """Number of entries that are not sent yet."""
        return self.path.read_bytes()[self._sent :].count(b"\n") if self.path.exists() else 0

    @property
    def entries_set_aside(self) -> int:
        """Number of entries that could not be sent since this outbox was made. They are kept in `set_aside`."""
        return len(self._aside)

    def append(self, run: str, action: str, arguments: dict[str, Any]) -> None:
        """Write an entry to the journal. Raises FileError if that fails, such as on a full disk."""
        values = {"run": run, "action": action, "time": int(time.time() * 1000), "arguments": arguments}
        # Characters that UTF-8 cannot encode become question marks: no store accepts them.
        text = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
        entry, line = journal.parse(text, str(self.path)), json.dumps(json.loads(text)).encode() + b"\n"
        with self._changed:
            self._remember(entry)
            try:
                journal.append(self.path, line)
            except OSError as error:
                self._size = journal.cut_torn_line(self.path)
                raise FileError(
                    f"{self.path}: cannot be written: {error.strerror}; the last saved state is kept"
                ) from error
            self._size += len(line)
            self._changed.notify()

    def keep(self, path: Path) -> str:
        """Link or copy a file, or the files of a folder, into `files/`, so that it can be sent even if it changes.

        Returns the name below `files/`.
        """
        kept = PurePosixPath(uuid.uuid4().hex, readable(path.name))
        for file in _files_in(path) if path.is_dir() else [path]:
            name = self._files / kept / readable(str(file.relative_to(path))) if path.is_dir() else self._files / kept
            try:
                name.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(file, name)
            except OSError as error:
                raise FileError(f"{name}: cannot be written: {error.strerror}; the last saved state is kept") from error
        return str(kept)

    def keep_made(self, name: str, make: Callable[[Path], None]) -> str:
        """Call `make` with the path of a new folder below `files/`, which it writes. Returns the folder's name."""
        kept = PurePosixPath(uuid.uuid4().hex, readable(name))
        (self._files / kept).parent.mkdir(parents=True)
        make(self._files / kept)
        return str(kept)

    def close(self, patience: float = PATIENCE) -> bool:
        """Send the remaining entries for at most `patience` seconds. Returns False, with a note, if some remain."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        self._abandoned = self._thread.is_alive()
        # Not `_abandoned`: the thread may have ended with an error.
        if self._sent != self._size:
            self.note(
                f"{self.waiting} log entries are not sent yet ({self.folder}); "
                "`hpcm sync`, or the same command, sends them"
            )
            return False
        self.sent_path.unlink(missing_ok=True)  # First: a journal without it is only sent again, which changes nothing.
        self.path.unlink(missing_ok=True)
        if not self.set_aside.exists():
            shutil.rmtree(self._files, ignore_errors=True)
            with suppress(OSError):  # The folder may hold files that are not the outbox's.
                self.folder.rmdir()
        return True

    @property
    def _files(self) -> Path:
        return self.folder / "files"

    def _remember(self, entry: Entry) -> None:
        if entry.action == "open":
            self._opened[entry.run] = {**entry.arguments, "time": entry.time}
        elif entry.action == "metrics":
            self.last_step |= {(entry.run, key): entry.arguments["step"] for key in entry.arguments["values"]}

    def _deliver(self) -> None:
        failures = 0
        while not self._abandoned:
            with self._changed:
                while self._sent == self._size and not self._closing:
                    self._changed.wait()
                size = self._size
            try:
                while batch := list(islice(journal.lines(self.path, self._sent), BATCH)):
                    for line in batch:
                        self._send_or_set_aside(line)
                    for run in self._runs.values():
                        run.confirm()
                    for line in batch:
                        fault("outbox")
                        self._acknowledge(line)
                    if failures:
                        self.note("log entries reach MLflow again")
                    failures = 0
                    if self._abandoned:
                        return
                if self._sent < size:
                    raise FileError(f"{self.path}: shortened or deleted while it was in use")
            except Exception as error:  # MLflow's HTTP and SQL libraries and the disk raise many types.
                failures += 1
                self._client, self._runs = None, {}  # Reopened next time, to see which entries arrived.
                self._pause(error, failures)
            if self._closing and self._sent == self._size:
                return

    def _send_or_set_aside(self, line: Line) -> None:
        """Send an entry. A damaged entry, or one that MLflow rejects twice, goes to `set_aside`, with a note."""
        if line.end in self._aside:  # by an earlier attempt to send the same batch
            return
        if line.entry is None:
            self._put_aside(line, f"{self.path}: {line.problem}")
            return
        try:
            self._send(line.entry)
        except EntryError as error:
            self._put_aside(line, f"the {line.entry.action} of run {line.entry.run} cannot be sent: {error}")
        except Exception as error:
            # Without a connection, the rejection is not about the entry.
            if self._client is None or not _is_rejection(error, line.entry):
                raise
            # The run or the experiment may be in the trash. Retry once with everything reopened.
            if self._rejected != line.end:
                self._rejected = line.end
                raise
            self._put_aside(line, f"MLflow rejected the {line.entry.action} of run {line.entry.run}: {brief(error)}")

    def _put_aside(self, line: Line, problem: str) -> None:
        journal.append(self.set_aside, line.text)
        self._aside.add(line.end)
        self.note(f"{problem}; the entry is kept in {self.set_aside}, and the other entries are sent")

    def _send(self, entry: Entry) -> None:
        if self._client is None:
            self._client = self.store.client()
        if entry.run not in self._runs:
            if entry.run not in self._opened:
                raise EntryError("the journal has no entry that opens this run")
            self._runs[entry.run] = open_run(self.store, self._client, entry.run, **self._opened[entry.run])
        run = self._runs[entry.run]
        if entry.action == "open":
            run.start()
        elif entry.action in WITH_FILES:
            arguments = {**entry.arguments, "path": self._own_file(entry.arguments["name"])}
            del arguments["name"]
            getattr(run, entry.action)(**arguments, time=entry.time)
        else:
            getattr(run, entry.action)(**entry.arguments, time=entry.time)

    def _own_file(self, name: str) -> Path:
        """A file or folder below `files/`. Raises EntryError for a path outside it, for links and for pipes."""
        parts = PurePosixPath(name).parts
        if len(parts) != 2 or {"..", "/"} & set(parts):
            raise EntryError(f"{name!r} is not the name of a file in {self._files}")
        path = self._files.joinpath(*parts)
        for place in (self._files, path.parent, path, *path.rglob("*")):
            if place.is_symlink():
                raise EntryError(f"{place}: this is a link, and links are not followed")
            if place.exists() and not (place.is_file() or place.is_dir()):
                raise EntryError(f"{place}: not a regular file")
        return path

    def _pause(self, error: Exception, failures: int) -> None:
        if failures == 1:
            problem = str(error) if isinstance(error, UserError) else f"cannot reach MLflow ({brief(error)})"
            self.note(f"{problem}; log entries are queued in {self.folder} and will be sent later")
        with self._changed:
            pause = 1.0 if self._closing else min(2.0 ** (failures - 1), LONGEST_PAUSE)
            self._changed.wait_for(lambda: self._closing, pause)
        if self._closing:
            time.sleep(0.2)

    def _acknowledge(self, line: Line) -> None:
        partial = self.sent_path.with_suffix(".partial")
        try:
            partial.unlink(missing_ok=True)
            with partial.open("x") as file:
                file.write(str(line.end))
            partial.replace(self.sent_path)
        except OSError as error:
            raise FileError(f"{self.sent_path}: cannot be written: {error.strerror}") from error
        self._sent = line.end
        if line.entry is not None and line.entry.action in WITH_FILES and line.end not in self._aside:
            with suppress(EntryError, LookupError, TypeError):
                shutil.rmtree(self._own_file(line.entry.arguments["name"]).parent, ignore_errors=True)


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(file, target)


def _files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if not file.is_dir()]


def _is_rejection(error: Exception, entry: Entry) -> bool:
    """Whether the entry is the cause of the error, and not the connection or the disk."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, OSError):  # also the errors of connections
        return error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)
    if not isinstance(error, MlflowException):
        return isinstance(error, ValueError | TypeError | LookupError | ArithmeticError)
    # Some servers, for example, have no registry of models.
    final = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
    if entry.action == "model":
        final |= {"ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED", "FEATURE_DISABLED", "PERMISSION_DENIED"}
    return error.error_code in final
