"""The command `hpcm`."""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import codec_cli

# A dependency of CompressAI's uses what PyTorch has deprecated; there is nothing here that a user could mend.
warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)

if TYPE_CHECKING:
    from pipeline.chain import Chain

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Move a trained HPCM image codec, stage by stage, to RWKV context models.",
)

RecipeName = Annotated[str, typer.Option(help="Folder under stages/, or a path to one of your own.")]
DataFolder = Annotated[str | None, typer.Option(help="Folder of training images [default: packaged photographs].")]
ValFolder = Annotated[str | None, typer.Option(help="Folder of validation images [default: packaged photographs].")]
Lmbda = Annotated[float | None, typer.Option(help="λ of the rate-distortion loss [default: the recipe's].")]
Baseline = Annotated[Path | None, typer.Option(help="Start from this codec (.safetensors, official .pth.tar).")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Override a setting, as in `phase2.seed=1`.")]
Runs = Annotated[Path, typer.Option(help="Folder of checkpoints and of the MLflow store.")]


def _chain(stage: str, recipe: str, overrides: list[str], baseline: Path | None, runs: Path) -> "Chain":
    from pipeline.chain import Chain
    from pipeline.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    return Chain(loaded.name, loaded.chain(stage), runs, baseline)


def _overrides(data: str | None, val: str | None, lmbda: float | None, settings: list[str] | None) -> list[str]:
    given = {"data.train": data, "data.val": val, "lmbda": lmbda}
    return [*(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None), *(settings or [])]


@app.command()
def run(
    stage: Annotated[str, typer.Argument(help="The stage to reach, such as phase4; its ancestors are run as needed.")],
    recipe: RecipeName = "tiny",
    data: DataFolder = None,
    val: ValFolder = None,
    lmbda: Lmbda = None,
    baseline: Baseline = None,
    settings: Settings = None,
    runs: Runs = Path("runs"),
    accept_anyway: Annotated[bool, typer.Option(help="Publish stages that miss their limits.")] = False,
) -> None:
    """Build a stage and everything before it: run what is missing, resume what was cut off.

    The same command, given again, continues where the last one stopped. Ctrl-C and SIGTERM save first.
    Several processes: `accelerate launch --num_processes 2 -m pipeline.cli run phase4`.
    """
    from accelerate import Accelerator

    from pipeline.display import ProgressWatcher, closing_table, console, plan_table
    from pipeline.interruption import Interruption
    from pipeline.job import Workplace
    from pipeline.trainer import Watcher

    chain = _chain(stage, recipe, _overrides(data, val, lmbda, settings), baseline, runs)
    accelerator = Accelerator(mixed_precision=chain.precision)
    main = accelerator.is_main_process
    if main:
        console.print(plan_table(chain, chain.plan()))
    with (
        Interruption(accelerator) as interruption,
        ProgressWatcher() if main else nullcontext(Watcher()) as watcher,
    ):
        chain.run(Workplace(chain.folder, interruption, watcher, accept_anyway))
    if main:
        console.print(closing_table(chain))


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(help="The stage to reach.")] = "phase4",
    recipe: RecipeName = "tiny",
    data: DataFolder = None,
    val: ValFolder = None,
    lmbda: Lmbda = None,
    baseline: Baseline = None,
    settings: Settings = None,
    runs: Runs = Path("runs"),
) -> None:
    """Say what `run` would do, and why."""
    from pipeline.display import console, plan_table

    chain = _chain(stage, recipe, _overrides(data, val, lmbda, settings), baseline, runs)
    console.print(plan_table(chain, chain.plan()))


@app.command()
def audit(runs: Runs = Path("runs")) -> None:
    """Say what each stage changed, and check the published files against MLflow's record; exits 1 where one differs."""
    from pipeline.audit import audit as audit_runs
    from pipeline.audit import audit_table
    from pipeline.display import console

    chains = audit_runs(runs)
    for chain in chains:
        console.print(audit_table(chain))
    if not chains:
        console.print(f"no chains yet in {runs}")
    if not all(stage.sound for chain in chains for stage in chain.stages):
        raise typer.Exit(1)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="What to measure: biwkv4.")] = "biwkv4",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Measure the Bi-WKV4 operator against its reference, a dense form, a running-maximum scan and a copy."""
    import torch

    from pipeline.bench import bench_biwkv4

    if what != "biwkv4":
        raise typer.BadParameter(f"{what!r}: there is biwkv4")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r}: there are {', '.join(dtypes)}")
    bench_biwkv4(dtype=dtypes[dtype], device=device)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="An official HPCM checkpoint, such as HPCM-Base_0.013.pth.tar.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Bring an official `.pth.tar` into this pipeline; the preset is recognised by its tensors."""
    from pipeline.checkpoints import import_official, publish
    from pipeline.display import console

    model = import_official(source)
    publish(target, model, {"name": "baseline", "imported_from": source.name})
    console.print(f"{target}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A stage's checkpoint.safetensors.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Write a checkpoint in half precision, to ship it: half the size, and loaded like any other."""
    from pipeline.display import console
    from pipeline.export import export_half

    export_half(source, target)
    console.print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, from {source.stat().st_size / 1e6:.1f} MB")


codec_cli.register(app)


def main() -> None:
    """Run the command line; a known error is one screen on stderr and exit code 1, a signal 128 + its number."""
    from pipeline.chain import ChainError
    from pipeline.checkpoints import CheckpointError
    from pipeline.freezing import SelectionError
    from pipeline.interruption import Interrupted
    from pipeline.photos import DataError
    from pipeline.recipe import RecipeError
    from pipeline.stage import StageError
    from pipeline.trainer import TrainingError
    from pipeline.transfer import TransferError

    known = (
        ChainError, CheckpointError, DataError, RecipeError, SelectionError, StageError, TrainingError, TransferError,
    )  # fmt: skip
    try:
        app()
    except known as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Interrupted as stop:
        print(f"{stop}; saved. The same command continues from there.", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    main()
