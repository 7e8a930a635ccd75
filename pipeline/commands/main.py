"""The command `hpcm`."""

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from pipeline.commands.lazy import HELP, MARKUP, LazyCommand
from pipeline.common.errors import Interrupted, LostProcess, MainProcessStopped, UserError
from pipeline.common.tables import printable

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
    context_settings=HELP,
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


def main() -> None:
    """Run the command line. It exits 1 after an error that a user can fix, and 128 + number after a signal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # File names may contain characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s")  # Otherwise mlflow.pytorch sets a level that hides warnings.
    try:
        app()
    except UserError as error:
        sys.exit(_told(error))
    except OSError as error:
        if error.errno is None:
            raise
        sys.exit(_told(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}"))
    except LostProcess as error:
        os._exit(_told(error))  # A normal exit would wait for the lost process.
    except MainProcessStopped as stop:
        sys.exit(stop.exit_code)
    except Interrupted as stop:
        print(f"{stop}; saved. Repeat the command to continue.", file=sys.stderr)
        sys.exit(stop.exit_code)


def _told(problem: object) -> int:
    """Print an error. Returns the exit code."""
    print(printable(f"error: {problem}"), file=sys.stderr, flush=True)
    return 1
