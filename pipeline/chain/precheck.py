"""Checks of a chain's stages that need only names and shapes. They run before anything else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from modules import HPCM, HPCMConfig
from pipeline.chain.stage_task import StageTask
from pipeline.common.errors import UserError
from pipeline.training.parameter_groups import parameter_groups, set_trainable, trainable_names
from pipeline.training.transfer import new_tensors, tensors_to_copy


class StageError(UserError):
    """A stage cannot begin, or its result is not accepted."""


def check_stages(tasks: Sequence[StageTask]) -> None:
    """Check sizes, rename rules, `train` and `lr` of a chain's stages, root first.

    Raises StageError, naming the stage, and RecipeError for invalid codec settings.
    """
    parent: HPCM | None = None
    for task in tasks:
        child = _sketch(task.config)
        with _naming(task.stage.name):
            _check(task, parent, child)
        parent = child


@cache
def _sketch(config: HPCMConfig) -> HPCM:
    return HPCM.on_meta(config)


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise StageError(f"{stage}: {error}") from error


def _check(task: StageTask, parent: HPCM | None, child: HPCM) -> None:
    if task.imported is not None:
        return
    for model in filter(None, (child, parent)):
        if task.stage.data.crop % model.downsampling_factor:
            raise StageError(
                f"data.crop = {task.stage.data.crop} must be a multiple of {model.downsampling_factor}, "
                "because of the codec's hierarchy and attention windows"
            )
    new = frozenset(child.state_dict())
    if parent is not None:
        new = new_tensors(parent, child, tensors_to_copy(parent, child, task.stage.transfer))
    elif task.start is not None:
        new = frozenset()
    for segment in task.stage.schedule:
        with _naming(segment.name):
            set_trainable(child, trainable_names(child, segment.train, new))
            parameter_groups(child, segment.lr, new)
