"""The command `hpcm`."""

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from pipeline.commands.exits import plain_errors
from pipeline.commands.lazy import MARKUP, LazyCommand
from pipeline.common.errors import Interrupted

COMMANDS = {
    "Migrate a codec": {
        "run": "Build a stage and its ancestors. Current stages are skipped, interrupted ones resumed.",
        "plan": "Show what `run` would do, and why; with `--measure`, how long it takes and whether it fits.",
        "rd-curve": "Run a recipe at several λ, and plot rate–distortion curves.",
        "sync": "Add to MLflow what it lacks of a folder of runs.",
        "clean": "List the interrupted trainings, and delete those that you choose.",
    },
    "Use a codec": {
        "import": "Convert an official `.pth.tar` checkpoint to safetensors.",
        "compress": "Compress images to `.hpcm` files.",
        "decompress": "Decode `.hpcm` files to images.",
        "info": "Check `.hpcm` files and checkpoints, and print what they contain.",
        "verify": "Check that this machine decodes files from other machines.",
        "evaluate": "Measure bits, PSNR, MS-SSIM and times on images, alone or against other codecs.",
        "export": "Write a checkpoint for distribution, for CompressAI's tools, or as programs.",
    },
    "Results and measurements": {
        "audit": "Show what each stage changed, and verify its files.",
        "compare": "Compare what codecs cost: parameters, multiplications, times and peak memory.",
        "report": "Write all results to one HTML page.",
        "ui": "Serve MLflow's pages on a folder of runs.",
    },
}
"""The panels of `--help`, with a summary of each command. A command's module is imported when it is called."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
    pretty_exceptions_enable=False,
    help="Move a trained HPCM image codec, stage by stage, to RWKV context models.",
)
for panel, commands in COMMANDS.items():
    for name, summary in commands.items():
        app.command(name, cls=LazyCommand, help=summary, rich_help_panel=panel)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hpcm {version('hpcm-rwkv')}")
        raise typer.Exit


@app.callback()
def _common_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


<<<<<<< HEAD
=======
def _request(
    stage: str,
    recipe: str,
    overrides: list[str],
    files: tuple[Path | None, Path | None],
    scratch: bool,
    runs: Path,
) -> "ChainRequest":
    from pipeline.chain.request import ChainRequest

    if sum(map(bool, (*files, scratch))) > 1:
        raise typer.BadParameter("give only one of --baseline (not trained), --start (trained further) and --scratch")
    return ChainRequest(recipe, tuple(overrides), stage, runs, *files, scratch)


@app.command(rich_help_panel=MIGRATE)
def run(
    stage: StageName,
    recipe: RecipeName = "tiny",
    data: DataFolder = None,
    val: ValFolder = None,
    lmbda: Lmbda = None,
    baseline: Baseline = None,
    start: Start = None,
    scratch: Scratch = False,
    settings: Settings = None,
    runs: Runs = Path("runs"),
    accept_anyway: AcceptAnyway = False,
    force: Annotated[bool, typer.Option("--force", help="Build the stage again, even if it is current.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Restart interrupted training instead of resuming it.")
    ] = False,
    yes: Yes = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Build a stage and its ancestors. Stages that are current are skipped; an interrupted stage is resumed.

    Ctrl-C and SIGTERM save and exit. Repeat the command to continue.
    For several processes: `accelerate launch --num_processes 2 -m pipeline run phase4`.
    """
    from pipeline.chain.context import Rebuild
    from pipeline.commands.confirmation import confirm
    from pipeline.commands.display import closing_table, console, hush, plan_table, show

    if quiet:
        hush()
    request = _request(stage, recipe, overrides_of(data, val, lmbda, settings), (baseline, start), scratch, runs)
    chain = request.chain()
    planned = chain.plan(force)
    show(plan_table(chain, planned))

    # These load PyTorch, so the plan is shown first.
    from pipeline.commands.running import run_planned
    from pipeline.common.processes import start_accelerator

    accelerator = start_accelerator(chain.precision)
    run_planned(chain, planned, accelerator, accept_anyway, Rebuild(force, fresh, partial(confirm, yes)), verbose)
    show(closing_table(chain))
    if accelerator.is_main_process:
        pictures = chain.tasks[-1].folder / "reconstructions"
        shown = [f"Images beside their reconstructions: {pictures}"] if pictures.is_dir() else []
        for line in (*shown, f"MLflow's pages on these runs: hpcm ui --runs {runs}"):
            console.print(line, soft_wrap=True)


@app.command(rich_help_panel=MIGRATE)
def plan(
    stage: StageName = "phase4",
    recipe: RecipeName = "tiny",
    data: DataFolder = None,
    val: ValFolder = None,
    lmbda: Lmbda = None,
    baseline: Baseline = None,
    start: Start = None,
    scratch: Scratch = False,
    settings: Settings = None,
    runs: Runs = Path("runs"),
    measure: Measure = False,
    processes: Processes = 1,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would do, and why. With `--measure`, show also how long it takes and whether it fits."""
    from pipeline.commands.display import plan_json, plan_table, show, show_json

    request = _request(stage, recipe, overrides_of(data, val, lmbda, settings), (baseline, start), scratch, runs)
    chain = request.chain()
    found = chain.plan()
    if as_json:
        show_json(plan_json(chain, found))
    else:
        show(plan_table(chain, found))
    if measure:
        from pipeline.commands.measured_plan import show_measured

        show_measured({stage: found}, processes)


@bench.command("biwkv4")
def bench_biwkv4(
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Compare the speed of the Bi-WKV4 operator with its reference, a dense form and a copy."""
    import torch

    from pipeline.evidence.bench_biwkv4 import bench_biwkv4 as measure

    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise typer.BadParameter(f"--dtype {dtype}: give one of {', '.join(dtypes)}")
    measure(dtype=dtypes[dtype], device=str(device_of(device)))


@app.command("import", rich_help_panel=USE)
def import_(
    source: Annotated[Path, typer.Argument(help="An official HPCM checkpoint, such as HPCM-Base_0.013.pth.tar.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    overwrite: codec.Overwrite = False,
) -> None:
    """Convert an official `.pth.tar` checkpoint to safetensors. The preset is recognized from the tensors."""
    from modules.config import preset_of
    from pipeline.commands.display import console
    from pipeline.weights.checkpoints import check_target, import_official, publish
    from pipeline.weights.published import Lineage

    check_target(source, target, overwrite)
    model = import_official(source)
    preset, phase = preset_of(model.config)
    publish(target, model, Lineage(name="baseline", imported_from=source.name))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{target}: preset {preset}, {f'Phase {phase}' if phase else 'Baseline'}, {size:.1f} M parameters")


runs_folder.register(app)
codec.register(app, bench)
evaluate.register(app)
evidence.register(app)
export.register(app)


>>>>>>> records
def main() -> None:
    """Run the command line. It exits 1 after an error that a user can fix, and 128 + number after a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # File names may contain characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        with plain_errors():
            app()
    except Interrupted as stop:
        print(f"{stop}; saved. Repeat the command to continue.", file=sys.stderr)
        sys.exit(stop.exit_code)
