"""A cache of chains that passed their checks. Checks of names and shapes need PyTorch, which takes seconds to load.

Each chain that passed has an empty file in the user's cache folder. Its name is a digest of all inputs of the checks.
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
    """Call `check_stages`, unless these stages passed it before."""
    mark = _cache() / _digest(tasks)
    if mark.exists():
        return

    from pipeline.chain.precheck import check_stages

    check_stages(tasks)
    with suppress(OSError):  # Without a cache the checks only take longer.
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _digest(tasks: Sequence[StageTask]) -> str:
    """SHA-256, hexadecimal, of the checks' inputs: the settings of shapes and parameter selection, and the code."""
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
