"""A real MLflow server with PostgreSQL, served artifacts and passwords. All of them fail while runs are mirrored."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from kills import attempt, exit_code
from mini import Notes
from mlflow_server import Server, free_port
from pages import shown, training
from typer.testing import CliRunner

from pipeline.commands.main import app
from pipeline.common.files import write_json
from pipeline.records import metrics
from pipeline.records.metrics import MetricsLog
from pipeline.tracking import live
from pipeline.tracking.live import live_mirror
from pipeline.tracking.store import Store

USER, PASSWORD = "admin", "a long password"
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
MISSING = [name for name in ("psycopg2", "flask_wtf") if find_spec(name) is None]
MISSING += ([] if PROGRAMS else ["postgresql"]) + ([] if os.getuid() == 0 else ["root"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {MISSING}; `make test-server` installs the packages"),
]
PART = 30
"""Number of steps that each chain logs between two failures."""
DATABASE_AWAY = float(os.environ.get("DATABASE_AWAY", "10"))
"""Seconds for which the database is stopped."""


class Database:
    """A separate PostgreSQL, run by the user postgres."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder / "database", free_port()
        self.folder.mkdir()
        shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "--auth", "trust", "--no-sync", "-D", str(self.folder))

    @property
    def uri(self) -> str:
        """The address of the database for the server."""
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-w", "-D", str(self.folder), "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """Stop at once; clients lose their connections."""
        self._run("pg_ctl", "-D", str(self.folder), "-m", "fast", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(PROGRAMS[-1] / program), *arguments]
        subprocess.run(
            command, check=True, user="postgres", group="postgres", cwd="/", stdout=subprocess.DEVNULL, timeout=120
        )


@contextmanager
def protected_server() -> Iterator[tuple[Server, Database]]:
    """A running server with basic authentication on a running database, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hpcm-server-"))
    folder.chmod(0o755)  # The user postgres must reach its folder.
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # Without it, the server hashes the password twice per request, which takes most of its time.
        "auth_cache_ttl_seconds = 300\n"
    )
    database = Database(folder)
    secrets = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret"}
    server = Server(folder, database.uri, "--app-name", "basic-auth", **secrets)
    try:
        database.start()
        server.start()
        yield server, database
    finally:
        server.kill()
        with suppress(subprocess.CalledProcessError):
            database.stop()
        shutil.rmtree(folder)


class Training:
    """A chain whose stage logs steps without end."""

    def __init__(self, chain: Path, folder: Path, number: int) -> None:
        self.chain, self.folder, self.number = chain, folder, number
        self.working = training(chain, folder, 0, f"key-{number}")
        facts = {"key": f"chain-{number}", "recipe": f"recipe-{number}", "lmbda": 0.013, "seed": 0}
        write_json(folder / "chain.json", facts)
        (self.working / metrics.FILE).unlink()
        self.log = MetricsLog(self.working / metrics.FILE)

    def part(self, part: int) -> None:
        """Log the steps of one part; this waits for nothing."""
        for step in range(part * PART + 1, (part + 1) * PART + 1):
            self.log.append({"loss": float(self.number * step), "bpp": 1.0 / step}, step)
        training(self.chain, self.folder, self.log.lines, f"key-{self.number}")


def test_every_step_arrives_once_whatever_fails(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSE", 0.5)
    monkeypatch.setattr(live, "PATIENCE", 120.0)
    with protected_server() as (server, database):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong password")
        log, told = tmp_path / "log", {name: value for name, value in os.environ.items() if "MLFLOW_TRACKING" in name}
        locked_out = attempt(tmp_path / "runs", "baseline", [], {**told, "LOG": str(log), "MIRROR": "1"})
        assert exit_code(locked_out) == 0
        assert "401" in log.read_text()
        assert "`hpcm sync` sends the rest" in log.read_text()
        assert "a wrong password" not in log.read_text()

        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        notes, store = Notes(), Store(server.uri)
        chains = [Training(chain, tmp_path / "others" / "mini" / str(number), number) for number in range(3)]
        mirrors = [live_mirror(store, notes.note, each.folder) for each in chains]
        for mirror in mirrors:
            mirror.__enter__()
        for part, (break_it, mend_it) in enumerate(
            [(server.kill, server.start), (database.stop, database.start), (lambda: None, lambda: None)]
        ):
            for each in chains:
                each.part(2 * part)
            server.wait_for_metrics()
            break_it()
            for each in chains:
                each.part(2 * part + 1)
            time.sleep(DATABASE_AWAY)
            mend_it()
        for mirror in mirrors:
            mirror.__exit__(None, None, None)
        print("\n".join(notes.lines))
        assert notes.lines[-1].endswith("answers again")

        found = shown(store)
        for each in chains:
            logged = found[f"mini phase1 key-{each.number}"]["metrics"]
            steps = range(1, 6 * PART + 1)
            assert [(step, float(value)) for step, _, value in logged["loss"]] == [
                (step, float(each.number * step)) for step in steps
            ]
            assert [step for step, *_ in logged["bpp"]] == list(steps)

        for command in (["sync"], ["audit", "--mlflow"]):
            done = CliRunner().invoke(app, [*command, "--runs", str(tmp_path / "runs")])
            assert done.exit_code == 0, done.output
        assert [step for step, *_ in shown(store)["mini baseline"]["metrics"]["train/scratch/loss"]] == [2, 4, 6]
