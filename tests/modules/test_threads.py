"""Threads of PyTorch sleep while they wait, or a warning says what to do."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from mini import ENVIRONMENT

from modules.threads import wait_without_spinning


@pytest.mark.parametrize("package", ["modules", "pipeline"])
def test_the_policy_is_set_before_pytorch_is_imported(package: str) -> None:
    code = f"import {package}, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["PASSIVE", "False"]


@pytest.mark.parametrize(("load", "policy", "warned"), [(1.5, None, True), (0.2, None, False), (1.5, "ACTIVE", False)])
def test_a_warning_gives_the_remedy_if_pytorch_was_first_on_a_busy_machine(
    load: float, policy: str | None, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        wait_without_spinning()
    assert [str(warning.message).split(":")[0] for warning in found] == ["this machine has other load, and PyTorch was "
        "imported before this package, so its threads spin while they wait"] * warned  # fmt: skip
