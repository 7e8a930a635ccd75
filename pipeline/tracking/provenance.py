"""The origin of a run as MLflow's tags: command, commit, versions and device."""

import getpass
import subprocess
import sys
from functools import cache
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def source_tags(device: torch.device) -> dict[str, str]:
    """MLflow's own tags of a run's source, and the versions of the software."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    # MLflow's pages show only what follows the last slash of a source's name.
    command = list(takewhile(lambda word: not word.startswith("-") and "/" not in word, words))
    tags = {"mlflow.source.name": " ".join(command), "mlflow.source.type": "LOCAL"}
    tags["hpcm.command"] = " ".join(words)[:500]
    tags["mlflow.user"] = _user()
    if commit := _commit():
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["hpcm.source_changed"] = str(commit.endswith("-dirty")).lower()
    tags["hpcm.device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"torch": torch.__version__, "compressai": metadata.version("compressai"), "cuda": torch.version.cuda}
    return tags | {f"hpcm.version.{name}": version for name, version in versions.items() if version}


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
