"""A SLURM cluster of two nodes on this machine, for tests: munged, slurmctld and two slurmd in a folder of their own.

It needs root and Debian's packages: apt-get install slurmctld slurmd slurm-client munge
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmctldTimeout=30
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,batch_sched_delay=1
KillWait=10
ReturnToService=2
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of a cluster that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]


@contextmanager
def cluster(folder: Path, cpus_per_node: int = 1) -> Iterator[dict[str, str]]:
    """Run a cluster while the context lasts. Yields the environment for sbatch and squeue."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    host = socket.gethostname()
    controller, *nodes = _free_ports(3)
    settings = {"host": host, "folder": folder, "controller": controller, "cpus": cpus_per_node}
    text = CONFIGURATION.format(nodes=f"[{nodes[0]}-{nodes[0] + 1}]", **settings)
    (folder / "slurm.conf").write_text(text)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    services: list[subprocess.Popen[bytes]] = []
    try:
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={folder / f'munge.{suffix}'}" for option, suffix in names.items()]
        services.append(subprocess.Popen(["munged", "--foreground", "--force", *options], env=environment))
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        services.append(subprocess.Popen(["slurmctld", "-D", "-i"], env=environment))
        for node in ("node1", "node2"):
            services.append(subprocess.Popen(["slurmd", "-D", "-N", node], env=environment))
        _wait_for(lambda: _idle_nodes(environment) == 2, f"two idle nodes; see {folder}/*.log")
        yield environment
    finally:
        # Jobs would outlive the services.
        subprocess.run(["scancel", "--user", "root"], env=environment)
        with suppress(AssertionError):
            _wait_for(lambda: not _listed(environment), "the end of the jobs")
        for service in reversed(services):
            service.send_signal(signal.SIGTERM)
        for service in services:
            try:
                service.wait(30)
            except subprocess.TimeoutExpired:
                service.kill()


def _idle_nodes(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format", "%T"]
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split().count("idle")


def _listed(environment: dict[str, str]) -> str:
    return subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True).stdout


def _wait_for(ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports of which the second and third are consecutive."""
    for first in range(20000, 30000, 10):
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, probe in enumerate((one, two, three)[:count]):
                    probe.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return [first + offset for offset in range(count)]
    raise AssertionError("no free ports")


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
