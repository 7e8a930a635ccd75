"""An MLflow server with passwords on PostgreSQL, both of which can be stopped and started.

It needs root, Debian's postgresql, and the packages psycopg2-binary and Flask-WTF: see `make test-server`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

USER, PASSWORD = "admin", "a long password"
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
READY_SECONDS = 300


def missing() -> str:
    """The requirements that this machine lacks, or an empty string."""
    absent = [name for name in ("psycopg2", "flask_wtf") if find_spec(name) is None]
    absent += [] if PROGRAMS else ["postgresql"]
    absent += [] if os.getuid() == 0 else ["root"]
    return ", ".join(absent)


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


class Server:
    """`mlflow server` with served artifacts and basic authentication."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder, self.database, self.port = folder, database, free_port()
        (folder / "auth.ini").write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder}/auth.db\n"
            f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            # Without it, the server hashes the password twice per request, which takes most of its time.
            "auth_cache_ttl_seconds = 300\n"
        )
        self._log, self._started_at = folder / "server.log", 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """MLFLOW_TRACKING_URI."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--backend-store-uri", self.database.uri]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {
            **os.environ,
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of this test",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes less
        }
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            environment.pop(name, None)
        with self._log.open("ab") as log:
            self._started_at = log.tell()
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + READY_SECONDS
        while not self._answers():
            ends = self._process.poll() is not None or time.monotonic() > end
            assert not ends, self._log.read_text()[-3000:]
            time.sleep(0.5)

    def wait_for_metrics(self) -> None:
        """Wait until it has taken metrics since it was last started."""
        end = time.monotonic() + READY_SECONDS
        while b'/log-batch HTTP/1.1" 200' not in self._log.read_bytes()[self._started_at :]:
            assert time.monotonic() < end, "no metrics arrive"
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it and its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        return False


def free_port() -> int:
    """A port that nothing uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server() -> Iterator[tuple[Server, Database]]:
    """A running server on a running database, deleted afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hpcm-server-"))
    folder.chmod(0o755)  # The user postgres must reach its folder.
    database = Database(folder)
    server = Server(folder, database)
    try:
        database.start()
        server.start()
        yield server, database
    finally:
        server.kill()
        with suppress(subprocess.CalledProcessError):
            database.stop()
        shutil.rmtree(folder)
