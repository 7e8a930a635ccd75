"""MLflow's system metrics of a run. MLflow's monitors measure, and the outbox sends the values."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pipeline.common.files import FileError
from pipeline.tracking.store import Run

OFF = {"false", "0"}


@contextmanager
def sampling(run: Run) -> Iterator[None]:
    """Log use of processor, memory, disk, network and GPU to the run, every 10 seconds.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another interval, and MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns
    it off. NVIDIA GPUs are measured if `nvidia-ml-py` is installed.
    """
    if run.key is None or os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in OFF:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=Sampler.default().sample, args=(run, ended), name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class Sampler:
    """Runs MLflow's monitors. MLflow's own SystemMetricsMonitor is not used, because it waits for a store."""

    monitors: tuple[Any, ...]
    seconds: float
    samples: int
    prefix: str

    @classmethod
    def default(cls) -> "Sampler":
        """The monitors of this machine, with the settings of MLflow's environment variables."""
        from mlflow import environment_variables as settings
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(Exception):  # It raises many types if NVIDIA's library or a GPU is missing.
            monitors.append(GPUMonitor())
        node = settings.MLFLOW_SYSTEM_METRICS_NODE_ID.get()
        return cls(
            tuple(monitors),
            settings.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10,
            settings.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 1,
            f"system/{node}/" if node else "system/",
        )

    def sample(self, run: Run, ended: threading.Event) -> None:
        """Log means of the measurements until `ended` is set."""
        while True:
            for _ in range(self.samples):
                for monitor in self.monitors:
                    monitor.collect_metrics()
                if ended.wait(self.seconds):
                    return
            values: dict[str, float] = {}
            for monitor in self.monitors:
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            with suppress(FileError):  # The disk is full, which the training itself reports.
                run.samples({f"{self.prefix}{name}": float(value) for name, value in values.items()})
