"""The configuration of the codec that a stage's settings choose."""

import re

from modules.config import PRESETS, HPCMConfig, preset_config
from pipeline.recipes.schema import Stage
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
        problem, path = str(error), ["model"]
        named = [key for key in choice.overrides if re.search(rf"\b{re.escape(key)}\b", problem)]
        if choice.preset not in PRESETS:
            path.append("preset")
        elif named:
            problem, path = problem.removeprefix(f"{named[0]}: "), ["model", "overrides", named[0]]
        raise RecipeError(located(Misfit(problem, *path), source, stage.name)) from error
    return config
