"""The origin of an attempt: command, user, commit, device and versions."""

import getpass
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from pipeline.common.files import readable
from pipeline.records.record import Source

ROOT = Path(__file__).parents[2]


def source_of(device: torch.device, environment: Mapping[str, str]) -> Source:
    """The origin of what this process computes on a device. `environment` is what affects rounding."""
    versions = {"torch": torch.__version__, "compressai": metadata.version("compressai"), "cuda": torch.version.cuda}
    commit = _commit()
    return Source(
        command=readable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))[:500],
        user=_user(),
        commit=commit.removesuffix("-dirty"),
        changed=commit.endswith("-dirty"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        versions={name: version for name, version in versions.items() if version},
        environment=environment,
    )


@cache
def _commit() -> str:
    """The commit of this program's source, with `-dirty` if files were changed; "" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # An installed package may be in the .venv of another project's repository.
        known = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if known.returncode:
            return ""
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # A container's user may have no name.
        return "unknown"
