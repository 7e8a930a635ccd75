"""The operations of Bi-WKV4, for PyTorch's `FlopCounterMode`, which counts them once this file is imported.

It is apart from the operator, because `torch.utils.flop_counter` imports Triton, which takes a tenth of a start.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

import modules.biwkv4.op  # noqa: F401 (registers the operator)


@register_flop_formula(torch.ops.hpcm.biwkv4)
def _forward_flops(w, u, k, v, *, out_shape=None, **kwargs) -> int:
    """Per element: two sums in two directions, the own term, an exponential and a division. `k` is k's shape."""
    return 14 * k[0] * k[1] * k[2]


@register_flop_formula(torch.ops.hpcm.biwkv4_backward)
def _backward_flops(grad_y, w, u, k, v, *, out_shape=None, **kwargs) -> int:
    """Per element: the forward sums, as many over gradients, and four products of both. `k` is k's shape."""
    return 40 * k[0] * k[1] * k[2]
