"""The HPCM codec and its RWKV phases, as plain PyTorch modules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modules.threads import wait_without_spinning

if TYPE_CHECKING:
    from modules.codec import HPCM, HPCM_Baseline, HPCM_Phase1, HPCM_Phase2, HPCM_Phase3, HPCM_Phase4
    from modules.config import PRESETS, HPCMConfig, preset_config
    from modules.network import Noise

__all__ = [
    "HPCM",
    "PRESETS",
    "HPCMConfig",
    "HPCM_Baseline",
    "HPCM_Phase1",
    "HPCM_Phase2",
    "HPCM_Phase3",
    "HPCM_Phase4",
    "Noise",
    "preset_config",
]


wait_without_spinning()


def __getattr__(name: str) -> Any:
    """Import a name on first use, because PyTorch and CompressAI take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    files = (import_module(f"modules.{file}") for file in ("config", "network", "codec"))
    return next(vars(file)[name] for file in files if name in vars(file))
