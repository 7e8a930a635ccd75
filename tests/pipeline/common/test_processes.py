"""The environment in which processes train, and their end."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.common import processes


def test_the_environment_does_not_change_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = processes.start_accelerator("no", cpu=True)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


def test_the_end_of_accelerate_launch_is_a_signal() -> None:
    script = """if True:
        import os, sys, time
        from pipeline.common.processes import ProcessGroup, start_accelerator
        processes = ProcessGroup(start_accelerator("no", cpu=True))
        print("begun", processes.agreed_signal(), flush=True)
        while not processes.agreed_signal():
            time.sleep(0.1)
        print("ended", int(processes.signum), flush=True)
    """
    # A process in the place of the launcher: SIGTERM ends it, and it passes nothing on.
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", launcher, script, "accelerate"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun 0\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "ended 15\n"
