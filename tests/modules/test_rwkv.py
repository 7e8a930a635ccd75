"""RWKV components against their plain formulas, and their training conveniences."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.biwkv4.op import biwkv4_reference
from modules.context.rwkv_kinds import (
    RWKVComponent,
    RWKVContextCell,
    RWKVFusionNet,
    RWKVSpatialPrior,
    RWKVSpatialPrior_S1_S2,
    RWKVSpatialPrior_S3,
)
from modules.layers.blocks import Checkpointed
from modules.layers.residual import DWConvRB
from modules.layers.rwkv import (
    ChannelMix,
    OmniShift,
    RWKVBlock,
    RWKVConvBlock,
    SpatialMix,
    TokenLinear,
)

CHANNELS = 16
IMAGE, PRIOR = (2, CHANNELS, 8, 8), [(2, 24, 8, 8), (1, 24, 1, 1)]


def randomized(module: nn.Module) -> nn.Module:
    """The module in double precision, no parameter at a special value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, CHANNELS, 6, 10, dtype=torch.float64).to(memory_format=torch.channels_last)


def shifted(shift: OmniShift, x: Tensor) -> Tensor:
    a = shift.alpha
    return a[0] * x + a[1] * shift.conv1x1(x) + a[2] * shift.conv3x3(x) + a[3] * shift.conv5x5(x)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("length", [40, 4096])
def test_token_linear_is_a_linear_layer_for_few_and_many_tokens(length: int) -> None:
    layer = TokenLinear(48, 20)
    tokens = torch.randn(2, length, 48, requires_grad=True)
    gradient = torch.randn(2, length, 20)
    mapped, expected = layer(tokens), F.linear(tokens, layer.weight)
    torch.testing.assert_close(mapped, expected)
    leaves = (tokens, layer.weight)
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, gradient) for y in (mapped, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_omni_shift_is_the_sum_of_its_branches_after_each_change_of_weights(x: Tensor) -> None:
    shift = randomized(OmniShift(CHANNELS)).eval()
    torch.testing.assert_close(shift(x), shifted(shift, x))
    with torch.no_grad():
        shift.conv5x5.weight += 1
        shift.alpha *= 2
    torch.testing.assert_close(shift(x), shifted(shift, x))


def test_spatial_mix_matches_its_formula(x: Tensor) -> None:
    mix = randomized(SpatialMix(CHANNELS))
    t = tokens(shifted(mix.omni_shift, x))
    attended = biwkv4_reference(mix.decay / 60, mix.boost / 60, mix.key(t), mix.value(t))
    torch.testing.assert_close(mix(x), mix.output(torch.sigmoid(mix.receptance(t)) * attended))


def test_rates_set_the_inner_widths() -> None:
    block = RWKVBlock(24, hidden_rate=0.5, mix_rate=0.25)
    assert block.channel_mix.key.weight.shape == (12, 24)
    assert block.spatial_mix.output.weight.shape == (24, 6)
    assert block.spatial_mix.decay.shape == (6,)


def test_channel_mix_matches_its_formula(x: Tensor) -> None:
    mix = randomized(ChannelMix(CHANNELS, hidden_rate=3))
    t = tokens(shifted(mix.omni_shift, x))
    torch.testing.assert_close(mix(x), torch.sigmoid(mix.receptance(t)) * mix.value(F.relu(mix.key(t)) ** 2))


def test_block_adds_both_mixes_and_is_the_identity_without_gamma(x: Tensor) -> None:
    block = randomized(RWKVBlock(CHANNELS, hidden_rate=2))

    def image(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unflatten(2, x.shape[2:])

    middle = x + image(block.gamma1 * block.ln1(block.spatial_mix(x)))
    torch.testing.assert_close(block(x), middle + image(block.gamma2 * block.ln2(block.channel_mix(middle))))
    nn.init.zeros_(block.gamma1)
    nn.init.zeros_(block.gamma2)
    assert torch.equal(block(x), x)


def test_a_conv_block_is_a_dwconvrb_without_gamma(x: Tensor) -> None:
    block, parent = randomized(RWKVConvBlock(CHANNELS)), randomized(DWConvRB(CHANNELS))
    block.conv_mix.load_state_dict(parent.branch.state_dict())
    mixed = block.ln1(block.spatial_mix(x)).transpose(1, 2).unflatten(2, x.shape[2:])
    middle = x + block.gamma1[:, None, None] * mixed
    torch.testing.assert_close(block(x), middle + parent.branch(middle))
    block.start_as_identity()
    assert torch.equal(block(x), parent(x))


COMPONENTS: dict[str, tuple[Callable[[], RWKVComponent], list[tuple[int, ...]]]] = {
    "context cell": (lambda: RWKVContextCell(CHANNELS, 2), [IMAGE, IMAGE]),
    "fusion net": (lambda: RWKVFusionNet(CHANNELS, num_blocks=2), [IMAGE]),
    "prior s1 s2": (lambda: RWKVSpatialPrior_S1_S2(8, hidden_rate=2), PRIOR),
    "prior s3": (lambda: RWKVSpatialPrior_S3(8, hidden_rate=2), PRIOR),
    "narrow prior": (lambda: RWKVSpatialPrior(8, (1, 0), hidden_rate=0.5, mix_rate=0.25), PRIOR),
    "prior with convolutions": (lambda: RWKVSpatialPrior(8, (1, 1), 2, mix_rate=0.5, channel_mix="conv"), PRIOR),
}


def built(name: str, *, grad: bool = False) -> tuple[RWKVComponent, list[Tensor]]:
    build, shapes = COMPONENTS[name]
    return randomized(build()), [torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def checkpoint_blocks(component: RWKVComponent) -> None:
    """Let every block recompute its activations."""
    blocks = [module for module in component.modules() if isinstance(module, Checkpointed)]
    assert blocks
    assert not any(block.use_checkpoint for block in blocks)
    for block in blocks:
        block.use_checkpoint = True


def gradients(component: RWKVComponent, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [*component.parameters(), *(x for x in inputs if x.requires_grad)]
    return list(torch.autograd.grad(component(*inputs).square().sum(), leaves))


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("upstream", [True, False], ids=["upstream grad", "no upstream grad"])
def test_gradient_checkpointing_changes_no_gradient(name: str, upstream: bool) -> None:
    component, inputs = built(name, grad=upstream)
    plain = gradients(component, inputs)
    checkpoint_blocks(component)
    checkpointed = gradients(component, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    component, inputs = built("fusion net", grad=True)

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            component(*inputs)
        return sum(sizes)

    plain = kept()
    checkpoint_blocks(component)
    assert kept() < plain / 2


def test_components_that_start_as_the_identity_reduce_to_their_last_1x1() -> None:
    cell, (x, h) = built("context cell")
    cell.start_as_identity()
    torch.testing.assert_close(cell(x, h), cell.output_proj(x))
    fusion, (x,) = built("fusion net")
    fusion.start_as_identity()
    torch.testing.assert_close(fusion(x), fusion.out_proj(x))
    prior, (x, q) = built("prior s3")
    prior.start_as_identity()
    torch.testing.assert_close(prior(x, q), prior.branch_2[-1](x * q))
