"""A real `mlflow server` that can be stopped and started."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

READY_SECONDS = 300


def free_port() -> int:
    """A port that nothing uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` with served artifacts, on the store at an address."""

    def __init__(self, folder: Path, store: str, *options: str, **environment: str) -> None:
        self.folder, self.store, self.options, self.environment = folder, store, options, environment
        self.port, self.log, self._started_at = free_port(), folder / "server.log", 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """MLFLOW_TRACKING_URI."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", self.store]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *self.options]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quick = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
        with self.log.open("ab") as log:
            self._started_at = log.tell()
            self._process = subprocess.Popen(
                command, env={**kept, **quick, **self.environment}, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + READY_SECONDS
        while not self._answers():
            ends = self._process.poll() is not None or time.monotonic() > end
            assert not ends, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def wait_for_metrics(self) -> None:
        """Wait until it has taken metrics since it was last started."""
        end = time.monotonic() + READY_SECONDS
        while b'/log-batch HTTP/1.1" 200' not in self.log.read_bytes()[self._started_at :]:
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
