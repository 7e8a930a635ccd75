"""Plugins: modules that register kinds of components, objectives or metrics when they are imported.

Only a user names them: in `plugins` of a recipe, in the environment variable HPCM_PLUGINS, or by installing a package
with an entry point in the group `hpcm.plugins`. A checkpoint cannot name one.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module, invalidate_caches, metadata
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

GROUP, VARIABLE = "hpcm.plugins", "HPCM_PLUGINS"

_loaded: dict[str, ModuleType] = {}
_registered: dict[str, set[str]] = {}
"""The names that each module registered."""


class PluginError(ValueError):
    """A plugin cannot be imported. The message names it and says why."""


def loaded_plugins() -> tuple[str, ...]:
    """The names of the modules that were loaded as plugins."""
    return tuple(_loaded)


def load_plugin(name: str, folder: Path | None = None) -> Path:
    """Import a plugin: the file or package of this name in a folder, or else a module on Python's path.

    Returns its file. Raises PluginError.
    """
    beside = folder is not None and ((folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file())
    if beside and str(folder) not in sys.path:
        sys.path.append(str(folder))  # At the end, so that no file in it hides a module of another package.
        invalidate_caches()
    try:
        module = import_module(name)
    except (Exception, SystemExit) as error:  # A module may raise anything.
        frames = [frame for frame in extract_tb(error.__traceback__)[1:] if "importlib" not in frame.filename]
        where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise PluginError(f"the plugin {name!r} cannot be imported: {type(error).__name__}: {error}{where}") from error
    file = Path(module.__file__ or "")
    if beside and folder not in (file.parent, file.parents[1]):
        raise PluginError(f"the plugin {name!r} has the name of another module, {file}; rename it")
    _loaded[name] = module
    return file


def load_plugins(names: Iterable[str]) -> None:
    """Import plugins by the names of their modules. Raises PluginError."""
    for name in names:
        load_plugin(name)


@cache
def load_installed_plugins() -> None:
    """Import the plugins of installed packages, and the modules and files in HPCM_PLUGINS. Raises PluginError."""
    load_plugins(point.value for point in metadata.entry_points(group=GROUP))
    for name in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(","))):
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise PluginError(f"{VARIABLE}: {name}: no such file")
            load_plugin(Path(name).stem, Path(name).resolve().parent)
        else:
            load_plugin(name)


def note_registration(name: str, module: str) -> None:
    """Note that a module registered a name of a kind, an objective or a metric."""
    _registered.setdefault(module, set()).add(name)


def names_of(plugin: str) -> set[str]:
    """The names of the kinds, objectives and metrics that a plugin's modules registered."""
    modules = (module for module in _registered if f"{module}.".startswith(f"{plugin}."))
    return {name for module in modules for name in _registered[module]}


def source_digest(file: Path) -> str:
    """SHA-256 of a plugin's source, in hexadecimal: its file, or all Python files of its package."""
    folder = file.parent
    files = sorted(folder.rglob("*.py")) if file.name == "__init__.py" else [file]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
