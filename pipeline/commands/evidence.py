"""The commands that audit and measure codecs: `hpcm audit`, `compare`, `rd-curve` and `report`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import (
    MIGRATE,
    RECIPE,
    RESULTS,
    AcceptAnyway,
    AsJson,
    Baseline,
    DataFolder,
    Device,
    Measure,
    Processes,
    Quiet,
    RecipeName,
    Runs,
    Settings,
    ValFolder,
    Verbose,
    Yes,
    device_of,
    overrides_of,
    size_of,
)

if TYPE_CHECKING:
    from pipeline.chain.lambda_sweep import Sweep


def audit(
    runs: Runs = Path("runs"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each stage changed, and check its published files against its record; exits 1 if one differs."""
    if markdown and as_json:
        raise typer.BadParameter("give --markdown or --json, not both")

    from pipeline.commands.display import console, show, show_json
    from pipeline.evidence import audit_display
    from pipeline.evidence.audit import audit as audit_runs

    chains, problems = audit_runs(runs)
    if as_json:
        show_json(audit_display.to_json(chains))
    elif markdown:
        print("\n".join(table.markdown() for chain in chains for table in audit_display.tables(chain)))
    else:
        for chain in chains:
            show(*audit_display.tables(chain))
        if not chains:
            console.print(f"no chains yet in {runs}: `hpcm run` starts one")
    for line in problems:
        print(line, file=sys.stderr)
    if problems or any(stage.problems for chain in chains for stage in chain.stages):
        raise typer.Exit(1)


def compare(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(help="Published codecs; each is compared with the first [default: --recipe]."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "--preset",
            help="Compare the stages of this recipe, untrained [default: tiny].",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    settings: Settings = None,
    device: Device = "cpu",
    size: Annotated[
        list[str] | None,
        typer.Option(help="Image size for coding, HEIGHTxWIDTH; repeatable [default: 256x256 512x768 1024x1536]."),
    ] = None,
    train_size: Annotated[
        list[str] | None,
        typer.Option(help="Image size for training steps of one image; repeatable [default: 256x256 512x768]."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of measurements; the median is shown.")] = 3,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in fresh processes.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for JSON and PNG [default: a new one in --runs].")
    ] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare what codecs cost: parameters, multiplications, times and peak memory.

    Codecs take turns, so that other load on the machine slows all of them. `hpcm report` shows the result.
    """
    from pipeline.commands.display import errors, hush, show, show_json
    from pipeline.common.figure_style import save
    from pipeline.evidence import comparison, contenders
    from pipeline.recipes.loading import load_recipe

    if quiet:
        hush()
    if checkpoints and (recipe or settings):
        raise typer.BadParameter("give checkpoints, or a recipe and its settings, not both")
    device_of(device)
    try:
        if checkpoints:
            title, codecs = "checkpoints", contenders.of_checkpoints(checkpoints)
        else:
            loaded = load_recipe(recipe or "tiny", settings or ())
            title, codecs = " ".join([loaded.name, *(settings or ())]), contenders.of_recipe(loaded)
        sizes, train_sizes = (
            tuple(map(size_of, given or default))
            for given, default in ((size, ("256x256", "512x768", "1024x1536")), (train_size, ("256x256", "512x768")))
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    folder = output or comparison.new_folder(runs, title)
    folder.mkdir(parents=True, exist_ok=True)  # Fail before the work if it cannot be written.
    plan = comparison.Plan(sizes, train_sizes, rounds, memory)
    found = comparison.compare(title, codecs, plan, device, lambda line: errors.print(f"  {line}", soft_wrap=True))
    if as_json:
        show_json(asdict(found))
    else:
        show(*comparison.tables(found))
    save(comparison.draw(found), folder / "comparison.png")
    found.write(folder)
    errors.print(f"written to {folder}", soft_wrap=True)


def rd_curve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Stages to build at every λ [default: all stages that are not the parent of another]."),
    ] = None,
    recipe: RecipeName = "tiny",
    lmbda: Annotated[
        list[float] | None,
        typer.Option(
            help="λ to train at; repeatable [default: the six λ of the official codecs].", rich_help_panel=RECIPE
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of all stages; repeatable, to train several chains per λ.", rich_help_panel=RECIPE),
    ] = None,
    data: DataFolder = None,
    val: ValFolder = None,
    baseline: Baseline = None,
    settings: Settings = None,
    start_from: Annotated[
        float | None,
        typer.Option(
            "--from",
            help="Train the first stage at this λ, and start it at the other λ from that result.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    from_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--from-set",
            help="Like --set, for stages that --from starts, as in `baseline.ema=0.9`; repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    runs: Runs = Path("runs"),
    plan: Annotated[bool, typer.Option("--plan", help="Show what is done and what is left, and exit.")] = False,
    measure: Measure = False,
    processes: Processes = 1,
    accept_anyway: AcceptAnyway = False,
    yes: Yes = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe at several λ and plot rate–distortion curves from real bitstreams.

    Each λ and seed has its own chain. Repeat the command to continue an interrupted run.
    """
    from pipeline.chain import lambda_sweep as sweep
    from pipeline.commands.display import hush, show

    if quiet:
        hush()
    if from_settings and start_from is None:
        raise typer.BadParameter("--from-set changes the stages that --from starts: give --from as well")
    starting_point = sweep.StartingPoint(start_from, tuple(from_settings or ())) if start_from is not None else None
    overrides = tuple(overrides_of(data, val, None, settings))
    lmbdas = tuple(lmbda or sweep.LMBDAS)
    wanted = sweep.Sweep(
        recipe, overrides, tuple(targets or ()), lmbdas, runs, starting_point, baseline, tuple(seed or ())
    )
    if measure:
        from pipeline.commands.measured_plan import show_measured

        show_measured({point.title: list(point.plan().values()) for point in wanted.points()}, processes)
    elif plan:
        show(wanted.table())
    else:
        _run_sweep(wanted, accept_anyway, yes, verbose)


def _run_sweep(sweep: Sweep, accept_anyway: bool, yes: bool, verbose: bool) -> None:
    from pipeline.chain.context import Rebuild
    from pipeline.commands.confirmation import confirm
    from pipeline.commands.display import console, show

    points = list(sweep.points())
    show(sweep.table())

    # These load PyTorch, so the table is shown first.
    from pipeline.chain.precheck import check_stages
    from pipeline.commands.running import run_planned
    from pipeline.common.processes import start_accelerator

    for point in points:
        for chain in point.chains:
            check_stages(chain.tasks)
    accelerator = start_accelerator(points[0].chains[0].precision)
    for point in points:
        for chain in point.chains:
            console.print(f"λ = {point.title}, to {chain.tasks[-1].stage.name}")
            rebuild = Rebuild(confirm=partial(confirm, yes))
            run_planned(chain, chain.plan(), accelerator, accept_anyway, rebuild, verbose)
        show(sweep.table())
    if accelerator.is_main_process:
        _draw_curves(sweep)


def _draw_curves(sweep: Sweep) -> None:
    from pipeline.commands.display import console, show
    from pipeline.common.figure_style import save
    from pipeline.evidence import figures, rate_distortion
    from pipeline.records.chains import read_chain

    folders = dict.fromkeys(chain.folder for point in sweep.points() for chain in point.chains)
    found = [read_chain(folder) for folder in folders]
    curves = rate_distortion.curves(found)
    deltas = rate_distortion.deltas_table(curves, rate_distortion.controls(found))
    show(rate_distortion.points_table("Real bitstreams of whole validation images", curves))
    if deltas.rows:
        show(deltas)
    else:
        console.print(f"no Bjøntegaard deltas: {rate_distortion.NO_CONTROL}", soft_wrap=True)
    path = next(iter(folders)).parent / "rate-distortion.png"
    save(figures.curves(curves, rate_distortion.all_on_kodak(found)), path)
    console.print(f"curves: {path}", soft_wrap=True)


def report(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: `report` in --runs].")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Recipe to report on; repeatable [default: all in --runs].")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write all results in a folder of runs to one self-contained HTML page, and the figures as PNG."""
    from pipeline.commands.display import console
    from pipeline.evidence.report import write

    page = write(runs, output or runs / "report", recipe or ())
    console.print(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)", soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(rich_help_panel=MIGRATE)(rd_curve)
    for command in (audit, compare, report):
        app.command(rich_help_panel=RESULTS)(command)
