"""Use of processor, memory, disk, network and GPU during a stage, measured by MLflow's monitors."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlflow import environment_variables as settings
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipeline.common.files import FileError
from pipeline.records.metrics import SYSTEM, MetricsLog

SECONDS = 10


@contextmanager
def sampling(folder: Path) -> Iterator[None]:
    """Append measurements to `system.jsonl` in a stage's folder, every 10 seconds.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another interval, and MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false turns
    it off. NVIDIA GPUs are measured if `nvidia-ml-py` is installed.
    """
    wanted = settings.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
    if wanted.is_set() and not wanted.get():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(folder, ended), name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _sample(folder: Path, ended: threading.Event) -> None:
    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # It raises many types if NVIDIA's library or a GPU is missing.
        monitors.append(GPUMonitor())
    log = MetricsLog(folder / SYSTEM)
    log.cut(log.lines)  # A kill may have left half a line.
    while not ended.wait(settings.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SECONDS):
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        with suppress(FileError):  # The disk is full, which the training itself reports.
            log.append(values, log.lines)
