"""The HPCM codec and its RWKV phases, as plain PyTorch modules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modules.codec import HPCM, HPCM_Baseline, HPCM_Phase1, HPCM_Phase2, HPCM_Phase3, HPCM_Phase4, Noise
    from modules.config import PRESETS, HPCMConfig, preset_config

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


def __getattr__(name: str) -> Any:
    """Import the codec on first use, because PyTorch and CompressAI take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    from modules import codec

    return getattr(codec, name)
