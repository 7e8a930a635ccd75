"""Commands whose modules are imported when they are called, so that the command line answers at once.

The function of the command `rd-curve` is `rd_curve` in `pipeline/commands/rd_curve.py`. Its parameters may be
dataclasses: each of their fields is an option. So commands share options, and pass them on as one value.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from inspect import Parameter, Signature, signature
from keyword import iskeyword
from typing import Any, Literal

import typer
from typer.core import TyperCommand

MARKUP: Literal["markdown"] = "markdown"
"""The markup of help texts."""


class LazyCommand(TyperCommand):
    """A command of which only name and summary are known until it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and parse its arguments. The context is the command's own, so that it is invoked."""
        name = str(self.name).replace("-", "_")
        name += "_" * iskeyword(name)
        app = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
        app.command(self.name)(with_options(getattr(import_module(f"pipeline.commands.{name}"), name)))
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
        for option in (signature(groups[name]).parameters.values() if name in groups else [parameter])
    ]

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    flat.__signature__ = Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def imported_when_called(place: str) -> Callable[..., Any]:
    """The function at `module:name`. Only commands use this, for the part that must wait for PyTorch."""
    module, _, name = place.partition(":")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **options)

    return call
