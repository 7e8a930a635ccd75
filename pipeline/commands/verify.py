"""`hpcm verify`: whether this machine decodes files from other machines."""

import sys

import torch
import typer

from pipeline.commands.devices import device_of
from pipeline.commands.display import console, show
from pipeline.commands.options import Device
from pipeline.common.tables import Table, number
from pipeline.common.timing import machine
from pipeline.evaluation import conformance


def verify(device: Device = "cpu") -> None:
    """Check that this machine decodes files from other machines: decode the streams of the conformance suite.

    Exits 1 if a stream's symbols differ from its reference, which was computed in float64.
    """
    table = Table("", ("stream", "W×H", "ε", "guard bytes", "largest scale error", "values ±1", ""))
    outcomes = list(conformance.verify(device_of(device)))
    for outcome in outcomes:
        height, width = outcome.size
        guards = f"{outcome.epsilon:.1g}", str(outcome.guard_bytes)
        values = "–" if outcome.pixels is None else str(outcome.pixels)
        mark = "FAIL" if outcome.fault else "pass"
        table.add(outcome.name, f"{width}×{height}", *guards, number(outcome.scale_error, ".1e"), values, mark)
    failed = [outcome for outcome in outcomes if outcome.fault]
    for outcome in failed:
        print(f"error: {outcome.name}: {outcome.fault}", file=sys.stderr)
    show(table)
    console.print(f"{machine(device)}; PyTorch {torch.__version__}; {torch.backends.cpu.get_cpu_capability()}")
    worst = max((outcome.scale_error / outcome.epsilon for outcome in outcomes if outcome.scale_error), default=0.0)
    result = f"{len(failed)} of {len(outcomes)} streams failed" if failed else f"pass: {len(outcomes)} streams"
    console.print(f"{result}; the largest scale error is {worst:.0%} of its stream's ε")
    if failed:
        raise typer.Exit(1)
