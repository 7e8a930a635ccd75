"""The module that each choice of a configuration names."""

from torch import nn

from modules.attention import CrossAttentionCell, PassThroughCell
from modules.config import Attention, Fusion, HPCMConfig, Prior
from modules.priors import DWConvSpatialPrior
from modules.rwkv import RWKVContextCell, RWKVFusionNet, RWKVSpatialPrior_S1_S2, RWKVSpatialPrior_S3


def attention(kind: Attention, config: HPCMConfig, scale: int) -> nn.Module:
    """The attention cell of scale 0, 1 or 2, coarse to fine."""
    if kind == "none":
        return PassThroughCell()
    if kind == "rwkv":
        return RWKVContextCell(2 * config.M, config.attn_hidden_rates[scale], config.mix_rate)
    return CrossAttentionCell(2 * config.M, config.heads, config.windows[scale])


def fusion(kind: Fusion, config: HPCMConfig) -> nn.Module:
    """What fuses the contexts of two scales."""
    if kind == "rwkv":
        return RWKVFusionNet(2 * config.M, config.fusion_blocks, config.fusion_hidden_rate, config.mix_rate)
    return nn.Conv2d(2 * config.M, 2 * config.M, 1)


def prior(kind: Prior, config: HPCMConfig, scale: int) -> nn.Module:
    """The spatial prior of s1 and s2 (scale 0), or of s3 (scale 1)."""
    if kind == "dwconv":
        return DWConvSpatialPrior(config.M, config.prior_depths[scale])
    rwkv_prior = (RWKVSpatialPrior_S1_S2, RWKVSpatialPrior_S3)[scale]
    depths = config.prior_blocks[scale], config.prior_last_blocks[scale]
    return rwkv_prior(config.M, depths[0], config.prior_hidden_rate, depths[1], config.mix_rate)
