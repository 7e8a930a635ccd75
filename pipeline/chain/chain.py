"""A chain of stages: its folder, its tasks and their plan."""

import json
import uuid
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

from modules.plugins import names_of, source_digest
from pipeline.chain.plan import ChainError, PlannedStage, status_of
from pipeline.chain.stage_task import StageTask
from pipeline.common.contracts import read_contract
from pipeline.common.files import FileError, write_json
from pipeline.common.tables import shortest
from pipeline.data.images import check_folder, find_images
from pipeline.recipes.loading import Recipe
from pipeline.recipes.schema import Stage
from pipeline.records.chains import CHAIN_FILE, ChainFacts
from pipeline.records.record import CHECKPOINT


class Chain:
    """The stages of a recipe from a root to the stage `target`, under runs/<recipe>/lmbda-<λ>[-seed-<s>]/<stage>.

    The seed is the root's. Each λ and each seed has its own folder. With the file `baseline` the root is imported; with
    the file `start` the root's training starts from those weights.
    """

    note = ""
    """What the root's file said about the chain's λ and metric."""
    doubt = ""
    """A contradiction between the root's file and the chain's λ or metric. A run asks before it imports the file."""

    def __init__(
        self, recipe: Recipe, target: str, runs: Path, baseline: Path | None = None, start: Path | None = None
    ):
        stages = recipe.chain(target)
        self.recipe, self.lmbda, self.runs, self.plugins = recipe.name, stages[-1].lmbda, runs, recipe.plugins
        self.precision = stages[0].precision
        self.seed = stages[0].seed
        seed = f"-seed-{self.seed}" if self.seed else ""
        self.folder = runs / recipe.name / f"lmbda-{shortest(self.lmbda)}{seed}"
        self.tasks: list[StageTask] = []
        find = cache(partial(find_images, runs=runs))
        digests = {name: source_digest(file) for name, file in recipe.plugins.items()}
        for stage in stages:
            parent = self.folder / stage.parent / CHECKPOINT if stage.parent else None
            files = (None, None) if parent else (baseline, start)
            used = {name: digest for name, digest in digests.items() if _uses(stage, name)}
            task = StageTask(stage, self.folder / stage.name, parent, *files, find, recipe.sources[stage.name], used)
            for file in filter(None, files):
                if file.absolute() == task.checkpoint.absolute():
                    raise ChainError(f"{file}: this is the chain's own {stage.name}; do not give it as an option")
            self.tasks.append(task)

    def plan(self, force: bool = False) -> list[PlannedStage]:
        """The status of every stage, root first. With `force` the last one is rebuilt even if it is current.

        Raises ChainError, DataError, and CheckpointError for a file that cannot be read.
        """
        data = self.tasks[-1].stage.data
        for folder, split in ((data.train, "train"), (data.val, "val")):
            if folder:
                check_folder(Path(folder), split)
        planned: list[PlannedStage] = []
        for task in self.tasks:
            planned.append(status_of(task, planned[-1] if planned else None, force and task is self.tasks[-1]))
        return planned

    def facts(self) -> ChainFacts:
        """The contents of `chain.json`, which is written with the first call. Raises ChainError if it is damaged."""
        path = self.folder / CHAIN_FILE
        if not path.exists():
            write_json(path, asdict(ChainFacts(uuid.uuid4().hex, self.recipe, self.lmbda, self.seed)))
        try:
            return read_contract(ChainFacts, path)
        except FileError as error:
            raise ChainError(f"{error}.\n  Delete the file; MLflow then gets new runs for this chain.") from error


def _uses(stage: Stage, plugin: str) -> bool:
    """Whether a stage names something that a plugin registered, or the plugin registered nothing."""
    settings, names = stage.model_dump_json(include={"model", "schedule", "metric"}), names_of(plugin)
    return not names or any(json.dumps(name) in settings for name in names)
