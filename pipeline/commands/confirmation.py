"""Questions before files are moved, or before a run that promises little."""

import sys

import typer

from pipeline.common.errors import UserError


class NotConfirmed(UserError):
    """Nobody agreed to what a command would do. Nothing was changed."""


def confirm(yes: bool, consequences: list[str]) -> None:
    """Print the consequences and ask; raises NotConfirmed unless the answer, or the option `--yes`, is yes."""
    for line in consequences:
        typer.echo(line)
    if yes:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed(
            "nothing was changed: there is no terminal for the question; give --yes to agree (with make: ARGS=--yes)"
        )
    if not typer.confirm("Continue?"):
        raise NotConfirmed("nothing was changed")
