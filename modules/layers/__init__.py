"""Layers: residual blocks, transforms, RWKV mixes, initialization, the entropy model."""
