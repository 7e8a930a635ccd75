"""What runs log to MLflow waits on disk, in order: training neither waits for the store nor fails for it.

A run logs something by appending an entry to a journal; one thread sends the entries. What a kill leaves unclear, the
store's own state decides (see StoredRun), and a metric keeps the time at which it was first said, so that sending it
twice is logging it once.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.fault_injection import fault
from pipeline.common.files import FileError
from pipeline.data.images import Photos
from pipeline.tracking.store import EndState, Run, Store, StoredRun, brief, open_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE = 30.0
"""Seconds that whoever closes an outbox waits for MLflow to take what was said to it."""
LONGEST_PAUSE = 30.0
"""Seconds between attempts to reach a store that does not answer."""

_NAME = re.compile(r"[\w.: /-]+")


class Outbox:
    """The journal of a chain and the thread that sends it; `note` is told when the store goes away and comes back."""

    def __init__(self, folder: Path, store: Store, note: Callable[[str], None] = lambda line: None):
        # Here and not in the thread: a data worker that is forked during an import would wait for it for ever.
        import mlflow  # noqa: F401

        self.folder, self.store, self.note = folder, store, note
        self.journal, self.sent_path = folder / "journal.jsonl", folder / "sent"
        folder.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._size = _cut_torn_line(self.journal)
        self._sent = _offset(self.sent_path, self.journal)
        self._opened: dict[str, dict[str, Any]] = {}
        self.last_step: dict[tuple[str, str], int] = {}
        """The last step said of each run and metric, as far as the journal goes back."""
        for _, entry in _entries(self.journal, 0):
            self._remember(entry)
        self._client: MlflowClient | None = None
        self._runs: dict[str, StoredRun] = {}
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._thread.start()

    def run(self, key: str, name: str, parent: Run | None = None, tags: Mapping[str, str] | None = None) -> Run:
        """The run with this key, opened (again)."""
        run = OutboxRun(self, key)
        run.queue("open", name=name, parent=parent.key if parent else None, tags=dict(tags or {}))
        return run

    @property
    def waiting(self) -> int:
        """How many entries have not been sent."""
        return self.journal.read_bytes()[self._sent :].count(b"\n") if self.journal.exists() else 0

    def append(self, run: str, action: str, arguments: dict[str, Any]) -> None:
        """Put an entry on disk; raises FileError where the disk is full."""
        entry = {"run": run, "action": action, "time": int(time.time() * 1000), "arguments": arguments}
        line = json.dumps(entry).encode() + b"\n"
        with self._changed:
            self._remember(entry)
            try:
                with self.journal.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self._size = _cut_torn_line(self.journal)
                raise FileError(
                    f"{self.journal}: cannot be written: {error.strerror}; the last saved state is kept"
                ) from error
            self._size += len(line)
            self._changed.notify()

    def keep(self, path: Path) -> Path:
        """A second name for a file, or for those in a folder: whatever happens to the first, it can be sent."""
        kept = self.folder / "files" / str(time.time_ns()) / path.name
        for file in path.iterdir() if path.is_dir() else [path]:
            name = kept / file.name if path.is_dir() else kept
            name.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, name)
            except OSError:
                shutil.copy2(file, name)
        return kept

    def close(self, patience: float = PATIENCE) -> bool:
        """Send what waits, for at most `patience` seconds; False where something still waits: it is said, and stays."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience)
        self._abandoned = self._thread.is_alive()
        # A thread that has ended may also have died.
        if self._sent != self._size:
            self.note(
                f"{self.waiting} log entries are not sent yet ({self.folder}); "
                "`hpcm sync`, or the same command, sends them"
            )
            return False
        self.sent_path.unlink(missing_ok=True)  # First: a journal without it is sent once more, which changes nothing.
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        return True

    def _remember(self, entry: dict[str, Any]) -> None:
        run, arguments = entry["run"], entry["arguments"]
        if entry["action"] == "open":
            self._opened[run] = {**arguments, "time": entry["time"]}
        elif entry["action"] == "metrics":
            self.last_step |= {(run, key): arguments["step"] for key in arguments["values"]}

    def _deliver(self) -> None:
        failures = 0
        while not self._abandoned:
            with self._changed:
                while self._sent == self._size and not self._closing:
                    self._changed.wait()
                size = self._size
            try:
                for end, entry in _entries(self.journal, self._sent):
                    self._send_or_report(entry, failures)
                    fault("outbox")
                    self._acknowledge(end, entry)
                    if failures:
                        self.note("log entries reach MLflow again")
                    failures = 0
                    if self._abandoned:
                        return
                if self._sent < size:
                    raise FileError(f"{self.journal}: shortened or deleted while it was in use")
            except Exception as error:  # Whatever MLflow's HTTP and SQL libraries raise, and the disk.
                failures += 1
                self._runs = {}  # To be opened again: the store decides what of this arrived.
                self._pause(error, failures)
            if self._closing and self._sent == self._size:
                return

    def _send_or_report(self, entry: dict[str, Any], failures: int) -> None:
        """Send an entry; one that MLflow rejects twice is reported, and done with."""
        try:
            self._send(entry)
        except Exception as error:
            # Where there is no store at all, it is not the entry that is rejected.
            if not (failures and self._client is not None and _is_rejection(error)):
                raise
            self._runs = {}
            self.note(f"MLflow rejected the {entry['say']} of run {entry['run']}: {brief(error)}")

    def _send(self, entry: dict[str, Any]) -> None:
        if self._client is None:
            self._client = self.store.client()
        key, action = entry["run"], entry["action"]
        if key not in self._runs:
            self._runs[key] = open_run(self._client, key, **self._opened[key])
        run = self._runs[key]
        if action == "open":
            self._client.update_run(run.run_id, status="RUNNING")
        else:
            getattr(run, action)(**entry["arguments"], time=entry["time"])

    def _pause(self, error: Exception, failures: int) -> None:
        if failures == 1:
            problem = str(error) if isinstance(error, FileError) else f"cannot reach MLflow ({brief(error)})"
            self.note(f"{problem}; log entries are queued in {self.folder} and will be sent later")
        with self._changed:
            pause = 1.0 if self._closing else min(2.0 ** (failures - 1), LONGEST_PAUSE)
            self._changed.wait_for(lambda: self._closing, pause)
        if self._closing:
            time.sleep(0.2)

    def _acknowledge(self, end: int, entry: dict[str, Any]) -> None:
        partial = self.sent_path.with_suffix(".partial")
        try:
            partial.write_text(str(end))
            partial.replace(self.sent_path)
        except OSError as error:
            raise FileError(f"{self.sent_path}: cannot be written: {error.strerror}") from error
        if entry["action"] == "artifact":
            shutil.rmtree(Path(entry["arguments"]["path"]).parent, ignore_errors=True)
        self._sent = end


class OutboxRun(Run):
    """A run whose words go through an outbox."""

    key: str

    def __init__(self, outbox: Outbox, key: str):
        self.outbox, self.key = outbox, key

    def queue(self, action: str, **arguments: Any) -> None:
        """Put an entry of this run into the outbox."""
        self.outbox.append(self.key, action, arguments)

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.queue("parameters", values={key: str(value)[:6000] for key, value in _flatten(values)})

    def tags(self, values: Mapping[str, Any]) -> None:
        self.queue("tags", values={key: str(value) for key, value in values.items()})

    def dataset(self, photos: Photos, context: str) -> None:
        profile = json.dumps({"images": len(photos.paths), "skipped": len(photos.skipped)})
        source = json.dumps({"uri": photos.source})
        self.queue(
            "dataset", name=photos.name, digest=photos.digest[:36], source=source, profile=profile, context=context
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        last = self.outbox.last_step
        fresh = {key: value for key, value in values.items() if step > last.get((self.key, key), -1)}
        if fresh:
            self.queue("metrics", values=fresh, step=step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.queue("artifact", path=str(self.outbox.keep(path).absolute()), folder=folder)

    def end(self, state: EndState) -> None:
        self.queue("end", state=state)


def _entries(journal: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries from an offset on, each with the offset where it ends; raises FileError for a damaged line."""
    if not journal.exists():
        return
    with journal.open("rb") as file:
        file.seek(start)
        while (line := file.readline()).endswith(b"\n"):
            end = file.tell()
            try:
                entry = json.loads(line)
                entry = {key: entry[key] for key in ("run", "action", "time", "arguments")}
            except (ValueError, TypeError, LookupError) as error:
                number = journal.read_bytes()[:end].count(b"\n")
                raise FileError(
                    f"{journal}: line {number} is damaged; move or delete the folder {journal.parent}, "
                    "and MLflow misses what it had not been sent"
                ) from error
            yield end, entry


def _offset(path: Path, journal: Path) -> int:
    """How much of the journal is noted as sent; 0 where the note does not fit it."""
    try:
        sent = int(path.read_text())
        return sent if journal.read_bytes()[:sent].endswith(b"\n") and sent <= journal.stat().st_size else 0
    except (OSError, ValueError):
        return 0


def _cut_torn_line(journal: Path) -> int:
    """Cut off a last line that a kill left unfinished; returns the length in bytes."""
    if not journal.exists():
        return 0
    content = journal.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(journal, whole)
    return whole


def _is_rejection(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and all(map(_NAME.fullmatch, value)):
            flat += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                flat += _flatten(item, f"{prefix}{key}.{item.get('name', index)}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
