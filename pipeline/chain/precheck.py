"""Checks of a chain's stages that need only names and shapes. They run before anything else."""

from collections.abc import Sequence
from functools import cache

from modules import HPCM
from pipeline.chain.stage_codec import StageError, codec_config
from pipeline.chain.stage_task import StageTask
from pipeline.recipes.yaml_source import Misfit, located
from pipeline.training.optimizer import parameter_groups, set_trainable, trainable_names
from pipeline.training.transfer import new_tensors, tensors_to_copy


def check_stages(tasks: Sequence[StageTask]) -> None:
    """Check sizes, rename rules, `train` and `lr` of a chain's stages, root first.

    Raises StageError, which names the file, line and key, and RecipeError for invalid codec settings.
    """
    sketch, parent = cache(HPCM.on_meta), None
    for task in tasks:
        child = sketch(codec_config(task))
        if task.imported is None:
            _check(task, parent, child)
        parent = child


def _check(task: StageTask, parent: HPCM | None, child: HPCM) -> None:
    prefix: tuple[str | int, ...] = ()
    try:
        for model in filter(None, (child, parent)):
            if task.stage.data.crop % model.downsampling_factor:
                raise Misfit(
                    f"{task.stage.data.crop} must be a multiple of {model.downsampling_factor}, because of the codec's "
                    "hierarchy and attention windows", "data", "crop",
                )  # fmt: skip
        new = frozenset() if task.start is not None else frozenset(child.state_dict())
        if parent is not None:
            new = new_tensors(parent, child, tensors_to_copy(parent, child, task.stage.transfer))
        for number, segment in enumerate(task.stage.schedule):
            prefix = "schedule", number
            set_trainable(child, trainable_names(child, segment.train, new))
            parameter_groups(child, segment.lr, new)
    except Misfit as misfit:
        raise StageError(located(misfit, task.source, task.stage.name, *prefix)) from misfit
