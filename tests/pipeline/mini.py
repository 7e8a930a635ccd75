"""The mini recipe: a codec so small that a whole chain takes seconds."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from modules import HPCM, preset_config
from pipeline.chain import Chain
from pipeline.interruption import Interruption
from pipeline.recipe import load_recipe
from pipeline.schema import Stage
from pipeline.stage import Workplace
from pipeline.trainer import Watcher

FOLDER = Path(__file__).parent / "recipes" / "mini"


def mini_stage(name: str) -> Stage:
    """A stage of the mini recipe."""
    return load_recipe(FOLDER).stages[name]


def mini_codec(phase: int) -> HPCM:
    """The mini recipe's codec at a phase, untrained."""
    return HPCM(preset_config("tiny", phase, **mini_stage("baseline").model.overrides))


class Notes(Watcher):
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def step(self, values: dict[str, float] | None) -> None:
        self.steps += 1

    def note(self, line: str) -> None:
        self.lines.append(line)


def mini_chain(runs: Path, stage: str, settings: Sequence[str] = (), baseline: Path | None = None) -> Chain:
    """The mini recipe's chain to a stage."""
    recipe = load_recipe(FOLDER, settings)
    return Chain(recipe.name, recipe.chain(stage), runs, baseline)


def run_chain(chain: Chain, watcher: Watcher | None = None, accept_anyway: bool = True) -> None:
    """Run a chain in this process."""
    with Interruption(Accelerator(cpu=True)) as interruption:
        chain.run(Workplace(chain.folder, interruption, watcher or Watcher(), accept_anyway))
