"""The configuration of the codec that a stage's settings choose."""

import re

from modules.config import PRESETS, HPCMConfig, preset_config
from pipeline.recipes.schema import ModelChoice, Stage
from pipeline.recipes.yaml_source import Misfit, RecipeError, YamlNode, located


def config_of(stage: Stage, source: YamlNode | None = None) -> HPCMConfig:
    """The configuration of a stage's codec. Raises RecipeError, which names file, line and key of a wrong setting."""
    choice = stage.model
    try:
        config = preset_config(choice.preset, choice.phase, **choice.overrides)
        if config.rates and not config.rates[0] <= stage.lmbda <= config.rates[-1]:
            raise ValueError(
                f"rates: the chain's λ = {stage.lmbda} must lie between the first and the last of {list(config.rates)}"
            )
    except ValueError as error:
        raise RecipeError(located(_misfit(choice, str(error)), source, stage.name)) from error
    return config


def _misfit(model: ModelChoice, problem: str) -> Misfit:
    """The problem of a codec's configuration, with the key that it names."""
    if model.preset not in PRESETS:
        return Misfit(problem, "model", "preset")
    named = [key for key in model.overrides if re.search(rf"\b{re.escape(key)}\b", problem)]
    path = ("overrides", named[0]) if named else ()
    return Misfit(problem.removeprefix(f"{named[0]}: ") if named else problem, "model", *path)
