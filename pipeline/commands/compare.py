"""`hpcm compare`: what codecs cost."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.checkpoint_info import codec_path
from pipeline.commands.devices import device_of
from pipeline.commands.display import errors, show, show_json
from pipeline.commands.options import RECIPE, AsJson, Device, Quiet, Runs, Settings
from pipeline.common.errors import raised_as
from pipeline.common.figure_style import save
from pipeline.evidence import comparison, contenders
from pipeline.evidence.contenders import Contender
from pipeline.recipes.loading import load_recipe


@dataclass(frozen=True)
class CodecChoice:
    """The codecs to compare."""

    PANEL = RECIPE

    checkpoints: Annotated[list[Path] | None, typer.Argument(parser=codec_path, metavar="[CODEC]…")] = None
    """The codecs, each compared with the first [default: --recipe]; `hpcm info --help` lists their forms."""
    recipe: Annotated[str | None, typer.Option("--recipe", "--preset")] = None
    """Compare the stages of this recipe, untrained [default: tiny]."""
    settings: Settings = None

    def contenders(self) -> tuple[str, list[Contender]]:
        """Title of the comparison, and the codecs. Raises BadParameter for options that exclude each other."""
        if self.checkpoints and (self.recipe or self.settings):
            raise typer.BadParameter("give checkpoints, or a recipe and its settings, not both")
        if self.checkpoints:
            return "checkpoints", contenders.of_checkpoints(self.checkpoints)
        loaded = load_recipe(self.recipe or "tiny", self.settings or ())
        return " ".join([loaded.name, *(self.settings or ())]), contenders.of_recipe(loaded)


@dataclass(frozen=True)
class MeasurementOptions:
    """What is measured, and where."""

    device: Device = "cpu"
    size: list[str] | None = None
    """Image size for coding, HEIGHTxWIDTH; repeatable [default: 256x256 512x768 1024x1536]."""
    train_size: list[str] | None = None
    """Image size for training steps of one image; repeatable [default: 256x256 512x768]."""
    rounds: Annotated[int, typer.Option(min=1)] = 3
    """Number of measurements; the median is shown."""
    memory: bool = True
    """Measure peak memory too, in fresh processes."""

    def plan(self) -> comparison.Plan:
        """The measurements. Raises BadParameter."""
        sizes = tuple(map(size_of, self.size or ("256x256", "512x768", "1024x1536")))
        train_sizes = tuple(map(size_of, self.train_size or ("256x256", "512x768")))
        return comparison.Plan(sizes, train_sizes, self.rounds, self.memory)


def size_of(text: str) -> tuple[int, int]:
    """Height and width in pixels from `512x768`; raises BadParameter."""
    found = re.fullmatch("([1-9][0-9]*)[xX×]([1-9][0-9]*)", text)
    if not found:
        raise typer.BadParameter(f"{text!r}: expected HEIGHTxWIDTH in pixels, such as 512x768")
    return int(found[1]), int(found[2])


def compare(
    choice: CodecChoice,
    measuring: MeasurementOptions,
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
    device, plan = measuring.device, measuring.plan()
    device_of(device)
    with raised_as(typer.BadParameter):
        title, codecs = choice.contenders()
    folder = output or comparison.new_folder(runs, title)
    folder.mkdir(parents=True, exist_ok=True)  # Fail before the work if it cannot be written.
    found = comparison.compare(title, codecs, plan, device, lambda line: errors.print(f"  {line}", soft_wrap=True))
    if as_json:
        show_json(asdict(found))
    else:
        show(*comparison.tables(found))
    save(comparison.draw(found), folder / "comparison.png")
    found.write(folder)
    errors.print(f"written to {folder}", soft_wrap=True)
