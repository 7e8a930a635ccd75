"""`hpcm audit`: what each stage changed, and whether its files are intact."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.display import console, show, show_json
from pipeline.commands.lazy import imported_when_called
from pipeline.commands.options import AsJson, Runs
from pipeline.common.errors import UserError
from pipeline.evidence import audit as audits

mlflow_check = imported_when_called("pipeline.tracking.mirror:check_of")


def audit(
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Compare MLflow's store with the folders too.")] = False,
) -> None:
    """Show what each stage changed, and check its published files against its record; exits 1 if one differs."""
    if not runs.is_dir():
        raise UserError(f"nothing was run in {runs}: no such folder; choose a folder with --runs")
    chains, problems = audits.audit(runs, mlflow_check(runs)) if mlflow else audits.audit(runs)
    if as_json:
        show_json(audits.to_json(chains))
    else:
        for chain in chains:
            show(*audits.tables(chain))
        if not chains:
            console.print(f"no chains yet in {runs}: `hpcm run` starts one")
    for line in problems:
        print(line, file=sys.stderr)
    if problems or any(stage.problems for chain in chains for stage in chain.stages):
        raise typer.Exit(1)
