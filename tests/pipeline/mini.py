"""The mini recipe: a codec so small that a whole chain takes seconds."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from modules import HPCM, preset_config
from pipeline.chain.chain import Chain
from pipeline.chain.context import RunContext
from pipeline.chain.run import run_chain as run_planned
from pipeline.common.errors import Interrupted
from pipeline.common.processes import ProcessGroup
from pipeline.data.crops import TrainingCrops
from pipeline.data.images import find_images
from pipeline.recipes.loading import load_recipe
from pipeline.recipes.schema import Segment, Stage
from pipeline.records.metrics import History, MetricsLog, read_history
from pipeline.records.record import StageRecord
from pipeline.training.reporting import Reporting, Watcher
from pipeline.training.trainer import Trainer
from pipeline.training.transfer import Migration
from pipeline.weights.checkpoints import codec_tensors, read
from pipeline.weights.training_state import Progress, StateFolder, TrainingState

FOLDER = Path(__file__).parent / "recipes" / "mini"
PHOTOS = FOLDER / "photos"
SMALL = [f"data.val={PHOTOS}"]
"""Settings for a validation image of 128×128. Evaluation takes little time then."""
STAGES = ["baseline", "phase1", "phase2", "phase3", "phase4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150", "PYTHONUNBUFFERED": "1"}


def mini_stage(name: str) -> Stage:
    """A stage of the mini recipe."""
    return load_recipe(FOLDER).stages[name]


def mini_codec(segment: int) -> HPCM:
    """The mini recipe's codec at a segment, untrained."""
    return HPCM(preset_config("tiny", segment, **mini_stage("baseline").model.overrides))


def with_rates(parent: HPCM, rates: Sequence[float]) -> HPCM:
    """A codec of several rates. At λ = 0.013 it codes as its parent does."""
    child = HPCM(parent.config.changed(rates=list(rates))).eval()
    child.load_state_dict(parent.state_dict(), strict=False)
    child.rate_vectors.start_from(0.013)
    return child


class Notes(Watcher):
    """Keeps the messages for the user."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def step(self, values: dict[str, float] | None) -> None:
        self.steps += 1

    def note(self, line: str) -> None:
        self.lines.append(line)


class Moments(Notes):
    """Keeps the tensors of the newest state when a segment of a chain's last stage begins."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.trainings, self.tensors = chain.tasks[-1].trainings, {}

    def segment(self, segment: Segment, done: int) -> None:
        tensors = read(sorted(self.trainings.glob("*/segment-*"))[-1]).tensors
        self.tensors[segment.name] = {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}


Hpcm = Callable[..., Any]
"""The fixture `hpcm`: runs the command line, checks its exit code, and returns what it printed."""
Finished = tuple[Chain, Notes]
"""The fixture `finished`: a chain run to Phase 4, and what was said."""


def mini_chain(runs: Path, stage: str, settings: Sequence[str] = (), baseline: Path | None = None) -> Chain:
    """The mini recipe's chain to a stage, with a small validation image."""
    recipe = load_recipe(FOLDER, [*SMALL, *settings])
    return Chain(recipe, stage, runs, baseline)


def run_chain(
    chain: Chain, notes: Notes | None = None, accept_anyway: bool = True, force: bool = False, cpu: bool = True,
    **options: Any,
) -> Notes:  # fmt: skip
    """Run a chain in this process, without MLflow. Returns what was said. `options` are those of RunContext."""
    notes = notes or Notes()
    with ProcessGroup(Accelerator(cpu=cpu)) as processes:
        context = RunContext(processes, notes, accept_anyway, force, **options)
        run_planned(chain, chain.plan(force), context)
    return notes


def copied(chain: Chain, runs: Path, last: str) -> Chain:
    """A copy of a finished chain up to a stage, in another folder of runs."""
    for name in STAGES[: STAGES.index(last) + 1]:
        shutil.copytree(chain.folder / name, runs / "mini" / chain.folder.name / name)
    return mini_chain(runs, last)


def record_of(chain: Chain, stage: str) -> StageRecord:
    """The record of a published stage."""
    return StageRecord.read(chain.folder / stage)


def begun(chain: Chain, stage: str) -> StageRecord:
    """The record of the only training of a stage that is not published."""
    (path,) = (chain.folder / "training" / stage).glob("*/record.json")
    return StageRecord.read(path.parent)


def history(folder: Path) -> dict[str, History]:
    """The metrics in a stage's folder, without times. A step that was logged twice is listed twice."""
    return {key: values for key, values in read_history(folder).items() if not key.endswith("seconds")}


class Metrics(MetricsLog):
    """Keeps the values that would be written, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def append(self, values: Mapping[str, float], step: int) -> None:
        self.logged[step] = dict(values)


def trainer_of(
    stage: Stage, states: Path, precision: str = "no", watcher: Watcher | None = None
) -> tuple[Trainer, TrainingState]:
    """A trainer of an untrained mini Baseline that saves states in a folder, and the state from which it starts."""
    states.mkdir(exist_ok=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    model = mini_codec(0)
    crops = TrainingCrops(find_images(None, "train", 128), 128, seed=0)
    processes = ProcessGroup(Accelerator(cpu=True, mixed_precision=precision))
    migration = Migration(model, None, frozenset(codec_tensors(model)))
    reporting = Reporting(Metrics(), watcher or Watcher())
    trainer = Trainer(stage, migration, crops, processes, StateFolder(states), reporting)
    return trainer, TrainingState(Progress(), codec_tensors(model))


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    """The metrics of a trainer of `trainer_of`, by step."""
    assert isinstance(trainer.reporting.metrics, Metrics)
    return trainer.reporting.metrics.logged


class Stop(Notes):
    """Sends a signal to its own process at a step of a segment."""

    def __init__(self, segment: str, step: int, signum: int) -> None:
        super().__init__()
        self.at, self.signum = (segment, step), signum

    def segment(self, segment: Segment, done: int) -> None:
        self.now = [segment.name, done]

    def step(self, values: dict[str, float] | None) -> None:
        self.now[1] += 1
        if tuple(self.now) == self.at:
            os.kill(os.getpid(), self.signum)


def interrupt(chain: Chain, segment: str, step: int, signum: int = signal.SIGTERM, **options: Any) -> int:
    """Run a chain until a signal at a step of a segment. Returns the exit code."""
    try:
        run_chain(chain, Stop(segment, step, signum), **options)
    except Interrupted as stopped:
        return stopped.exit_code
    raise AssertionError("the run was not interrupted")


def hpcm(*arguments: object, launcher: tuple[str, ...] = ("-m", "pipeline")) -> list[str]:
    """The command line of `hpcm`."""
    return [sys.executable, *launcher, *map(str, arguments)]


class Malicious:
    """An object whose pickle runs a command when it is loaded: it makes the file `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)
