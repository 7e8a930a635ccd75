"""Commands whose modules are imported when they are called, so that the command line answers at once.

The function of the command `rd-curve` is `rd_curve` in `pipeline/commands/rd_curve.py`. Its parameters may be
dataclasses: each of their fields is an option, and the docstring below the field is its help. So commands share
options, and pass them on as one value.
"""

import ast
import gc
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from inspect import Parameter, Signature, getsource, signature
from itertools import pairwise
from keyword import iskeyword
from textwrap import dedent
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand
from typer.models import ParameterInfo

MARKUP: Literal["markdown"] = "markdown"
"""The markup of help texts."""
HELP = {"help_option_names": ["-h", "--help"]}
"""The settings of every command."""


class LazyCommand(TyperCommand):
    """A command of which only name and summary are known until it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and parse its arguments. The context is the command's own, so that it is invoked."""
        name = str(self.name).replace("-", "_")
        name += "_" * iskeyword(name)
        app = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
        app.command(self.name, context_settings=HELP)(
            with_options(getattr(_imported(f"pipeline.commands.{name}"), name))
        )
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a parameter for each field of its parameters that are dataclasses, as Typer needs it."""
    parameters = signature(command).parameters
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in parameters.items() if is_dataclass(parameter.annotation)
    }
    options = [
        option.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in parameters.items()
        for option in (_options(groups[name]) if name in groups else [parameter])
    ]

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    flat.__signature__ = Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def _options(group: Any) -> Iterator[Parameter]:
    """The fields of a dataclass as options, in the panel `PANEL` of the class. A switch that is off has no `--no-`."""
    helps = {name: text for kind in reversed(group.__mro__) if is_dataclass(kind) for name, text in _docstrings(kind)}
    for name, parameter in signature(group).parameters.items():
        others = getattr(parameter.annotation, "__metadata__", ())
        form = parameter.annotation.__origin__ if others else parameter.annotation
        given = next((info for info in others if isinstance(info, ParameterInfo)), None)
        if given is None or not given.help:
            names = [f"--{name.replace('_', '-')}"] if form is bool and parameter.default is False else []
            info = copy(given) if given else typer.Option(*names)
            info.help, info.rich_help_panel = helps[name], getattr(group, "PANEL", None)
            parameter = parameter.replace(annotation=Annotated[form, info])
        yield parameter


def _docstrings(group: Any) -> Iterator[tuple[str, str]]:
    """The names of the fields that a class defines, and the docstrings below them, each in one line."""
    (definition,) = ast.parse(dedent(getsource(group))).body
    for field, text in pairwise(definition.body):  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            yield field.target.id, " ".join(ast.literal_eval(text.value).split())


def imported_when_called(place: str) -> Callable[..., Any]:
    """The function at `module:name`. Only commands use this, for the part that must wait for PyTorch."""
    module, _, name = place.partition(":")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(_imported(module), name)(*arguments, **options)

    return call


def _imported(module: str) -> ModuleType:
    """The module. PyTorch's objects stay, and looking for garbage among them would take a sixth of a start."""
    if module in sys.modules:  # Objects that were made since then may become garbage.
        return sys.modules[module]
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.enable()
