"""Checks of a chain's stages that need only names and shapes. They run before anything else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from modules import HPCM, HPCMConfig
from pipeline.chain.stage_codec import StageError, codec_config
from pipeline.chain.stage_task import StageTask
from pipeline.recipes.yaml_source import Misfit
from pipeline.training.parameter_groups import parameter_groups, set_trainable, trainable_names
from pipeline.training.transfer import new_tensors, tensors_to_copy


def check_stages(tasks: Sequence[StageTask]) -> None:
    """Check sizes, rename rules, `train` and `lr` of a chain's stages, root first.

    Raises StageError, which names the file, line and key, and RecipeError for invalid codec settings.
    """
    parent: HPCM | None = None
    for task in tasks:
        child = _sketch(codec_config(task))
        _check(task, parent, child)
        parent = child


@cache
def _sketch(config: HPCMConfig) -> HPCM:
    return HPCM.on_meta(config)


@contextmanager
def _locating(task: StageTask, *prefix: str | int) -> Iterator[None]:
    try:
        yield
    except Misfit as misfit:
        raise StageError(task.located(misfit, *prefix)) from misfit


def _check(task: StageTask, parent: HPCM | None, child: HPCM) -> None:
    if task.imported is not None:
        return
    with _locating(task):
        for model in filter(None, (child, parent)):
            if task.stage.data.crop % model.downsampling_factor:
                raise Misfit(
                    f"{task.stage.data.crop} must be a multiple of {model.downsampling_factor}, because of the codec's "
                    "hierarchy and attention windows", "data", "crop",
                )  # fmt: skip
    new = frozenset(child.state_dict())
    if parent is not None:
        with _locating(task):
            new = new_tensors(parent, child, tensors_to_copy(parent, child, task.stage.transfer))
    elif task.start is not None:
        new = frozenset()
    for number, segment in enumerate(task.stage.schedule):
        with _locating(task, "schedule", number):
            set_trainable(child, trainable_names(child, segment.train, new))
            parameter_groups(child, segment.lr, new)
