"""Asks before files are moved, and before a run that lacks what its recipe needs."""

import sys

import typer

from pipeline.common.errors import UserError


class NotConfirmed(UserError):
    """Nobody agreed to the consequences of a command. Nothing was changed."""


def confirm(yes: bool, consequences: list[str]) -> None:
    """Print the consequences and ask whether to continue. Raises NotConfirmed if not. With `yes`, do not ask."""
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
