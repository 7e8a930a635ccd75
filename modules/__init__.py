"""The HPCM codec and its RWKV phases, as plain PyTorch modules."""

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
