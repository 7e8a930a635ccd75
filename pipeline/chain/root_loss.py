"""The λ and metric of a chain whose root comes from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.chain.plan import ChainError
from pipeline.common.tables import shortest
from pipeline.recipes.schema import Stage
from pipeline.weights.trained_for import LMBDAS, TrainedFor, trained_for


@dataclass(frozen=True)
class RootLoss:
    """What the file of a root says about the loss of its chain."""

    overrides: tuple[str, ...] = ()
    """Settings that the file decides, as overrides of the recipe."""
    note: str = ""
    """A line for the user about these settings."""
    doubt: str = ""
    """A contradiction between the file and the settings that were given, to which the user must agree."""


def loss_of_baseline(file: Path, root: Stage, overrides: Sequence[str]) -> RootLoss:
    """The loss of a chain that continues with the codec of a file.

    It is the file's own, unless `overrides` give another. Raises ChainError if λ is neither known nor given.
    """
    known = trained_for(file)
    if known is None:
        _check_given(file, root.metric, overrides)
        return RootLoss()
    lmbda = root.lmbda if _is_given("lmbda", overrides) else known.lmbda
    metric = root.metric if _is_given("metric", overrides) else known.metric
    if (lmbda, metric) == (known.lmbda, known.metric):
        return RootLoss((f"lmbda={lmbda}", f"metric={metric}"), note=_shown(known))
    doubt = f"{file.name} has {_shown(known)}, but this chain has λ = {shortest(lmbda)} for {metric}"
    return RootLoss((f"lmbda={lmbda}", f"metric={metric}"), doubt=doubt)


def loss_of_start(file: Path, root: Stage, overrides: Sequence[str]) -> RootLoss:
    """The loss of a chain whose root is trained from the weights of a file, which may have had another loss.

    Only λ is taken from the file, if it is not given and the metric is the same. Raises as `loss_of_baseline` does.
    """
    if _is_given("lmbda", overrides):
        return RootLoss()
    known = trained_for(file)
    if known is None or known.metric != root.metric:
        _check_given(file, root.metric, overrides)
        return RootLoss()
    return RootLoss((f"lmbda={known.lmbda}",), note=_shown(known))


def _shown(known: TrainedFor) -> str:
    return f"λ = {shortest(known.lmbda)} for {known.metric}, by {known.source}"


def _is_given(key: str, overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0].strip() == key for override in overrides)


def _check_given(file: Path, metric: str, overrides: Sequence[str]) -> None:
    if _is_given("lmbda", overrides):
        return
    official = "; ".join(f"{', '.join(map(shortest, lmbdas))} for {name}" for name, lmbdas in LMBDAS.items())
    raise ChainError(
        f"{file}: neither the file nor its name says for which λ of {metric} it was trained. Give it with --lmbda "
        f"(with make: LAMBDA=).\n  The official λ are {official}."
    )
