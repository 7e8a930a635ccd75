"""Bi-WKV4 in plain PyTorch operators, for exported programs. The graph is the same for every sequence length."""

import torch
from torch import Tensor


def biwkv4_decomposed(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute what `biwkv4_reference` computes, by cumulative sums in float64, in O(T). T may be symbolic.

    w, u (C,); k, v (B, T, C); returns (B, T, C), of k's dtype. Within a channel, k + T·|w| may span 600. A position
    whose weight is further below the largest one counts as 0.
    """
    dtype = k.dtype
    w, u, k, v = (x.double() for x in (w, u, k, v))
    own = u + k
    sums, scale = _all_before(w, k, v)
    sums_after, scale_after = (x.flip(-2) for x in _all_before(w, k.flip(1), v.flip(1)))
    largest = own.maximum(_log(sums[1], scale)).maximum(_log(sums_after[1], scale_after))
    own = torch.exp(own - largest)
    before, after = torch.exp(scale - largest), torch.exp(scale_after - largest)
    weighted = sums[0] * before + sums_after[0] * after + own * v
    return (weighted / (sums[1] * before + sums_after[1] * after + own)).to(dtype)


def _all_before(w: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{i<t} of e^{−(t−1−i)·w + k_i}·v_i and of the same without v, (2, B, T, C), times e^{−scale}, (B, T, C)."""
    position = torch.arange(k.shape[1], device=k.device, dtype=k.dtype)[:, None]
    log = k + position * w
    largest = log.amax(1, keepdim=True)
    weight = torch.exp(log - largest)
    sums = torch.stack((weight * v, weight)).cumsum(2)
    exclusive = torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]), dim=2)
    return exclusive, largest - (position - 1) * w


def _log(sum_of_weights: Tensor, scale: Tensor) -> Tensor:
    return torch.log(sum_of_weights) + scale
