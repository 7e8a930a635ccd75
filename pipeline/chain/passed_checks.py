"""Chains that passed their checks are remembered: to check names and shapes takes PyTorch, which takes seconds to load.

A file per chain that passed lies in the user's cache folder, named by all that the checks depend on.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import modules
from pipeline.chain.stage_task import StageTask


def check_unless_passed(tasks: Sequence[StageTask]) -> None:
    """Raise what `check_stages` raises, unless these stages have passed it before."""
    mark = _cache() / _digest(tasks)
    if mark.exists():
        return

    from pipeline.chain.precheck import check_stages

    check_stages(tasks)
    with suppress(OSError):  # A cache that cannot be written costs time alone.
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _digest(tasks: Sequence[StageTask]) -> str:
    """SHA-256 over what the checks look at, hexadecimal: settings that shape a codec or select its parameters, code."""
    looked_at = [
        (
            task.stage.model_dump(mode="json", include={"name", "model", "transfer"}),
            task.stage.data.crop,
            [(segment.name, segment.train, list(segment.lr)) for segment in task.stage.schedule],
            task.imported is not None,
            task.start is not None,
        )
        for task in tasks
    ]
    return hashlib.sha256(json.dumps([looked_at, _code()]).encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256(f"{version('torch')} {version('compressai')}".encode())
    here = Path(__file__).parent
    for folder in (Path(modules.__path__[0]), here.parent / "training", here):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpcm_checks"
