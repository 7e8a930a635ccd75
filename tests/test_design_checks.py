"""The five checks that the design asks for, by name."""

from collections.abc import Callable

import pytest
import torch

from modules import HPCM, preset_config
from modules.context.attention import CrossAttentionCell
from modules.context.fusion import PointwiseFusion
from modules.context.priors import DWConvSpatialPrior
from modules.context.rwkv_kinds import (
    RWKVContextCell,
    RWKVFusionNet,
    RWKVSpatialPrior,
    RWKVSpatialPrior_S1_S2,
    RWKVSpatialPrior_S3,
    RWKVSpatialPriorBlock,
)
from modules.layers.residual import DWConvRB

BASELINE = {
    "attn_s1": CrossAttentionCell,
    "attn_s2": CrossAttentionCell,
    "attn_s3": CrossAttentionCell,
    "context_net.0": PointwiseFusion,
    "context_net.1": PointwiseFusion,
    "y_spatial_prior_s1_s2": DWConvSpatialPrior,
    "y_spatial_prior_s3": DWConvSpatialPrior,
}
CHANGES = [
    {},
    {"attn_s3": RWKVContextCell},
    {"attn_s1": RWKVContextCell, "attn_s2": RWKVContextCell},
    {"context_net.0": RWKVFusionNet, "context_net.1": RWKVFusionNet},
    {"y_spatial_prior_s1_s2": RWKVSpatialPrior, "y_spatial_prior_s3": RWKVSpatialPrior},
]
KINDS = [BASELINE | {k: v for change in CHANGES[: phase + 1] for k, v in change.items()} for phase in range(5)]


def full_size(phase: int) -> HPCM:
    return HPCM.on_meta(preset_config("base", phase))


def test_imports() -> None:
    import modules
    import pipeline.commands.main

    assert all(hasattr(modules, name) for name in modules.__all__)
    commands = {command.name or command.callback.__name__ for command in pipeline.commands.main.app.registered_commands}
    assert {"run", "plan", "import", "audit"} <= commands


@pytest.mark.parametrize("build", [RWKVSpatialPrior_S1_S2, RWKVSpatialPrior_S3])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 16), (7, 5)])
def test_spatial_prior(build: Callable[..., torch.nn.Module], size: tuple[int, int]) -> None:
    prior = build(M=16)
    x = torch.randn(2, 48, *size, requires_grad=True)
    out = prior(x, torch.ones(1, 48, 1, 1))
    assert out.shape == (2, 32, *size)
    assert torch.isfinite(out).all()
    out.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is not None for parameter in prior.parameters())


@pytest.mark.parametrize("phase", range(5))
def test_architecture_of_every_phase(phase: int) -> None:
    model = full_size(phase)
    assert {name: type(model.get_submodule(name)) for name in BASELINE} == KINDS[phase]
    if phase >= 1:
        assert hidden_rate(model.attn_s3) == 4
    if phase >= 2:
        assert [hidden_rate(model.attn_s1), hidden_rate(model.attn_s2)] == [2, 3]
    block = RWKVSpatialPriorBlock if phase == 4 else DWConvRB
    for prior, depths in ((model.y_spatial_prior_s1_s2, (2, 1)), (model.y_spatial_prior_s3, (3, 2))):
        assert [type(layer) for layer in prior.branch_1] == [block] * depths[0]
        assert [type(layer) for layer in prior.branch_2] == [block] * depths[1] + [torch.nn.Conv2d]


def hidden_rate(cell: RWKVContextCell) -> float:
    key = cell.block.channel_mix.key
    return key.out_features / key.in_features


@pytest.mark.parametrize("size", [256, pytest.param(512, marks=pytest.mark.slow)])
@torch.no_grad()
def test_forward_of_phase4(size: int) -> None:
    model = HPCM.from_preset("base", 4).eval()
    coded = model(torch.rand(1, 3, size, size))
    assert coded["x_hat"].shape == (1, 3, size, size)
    assert coded["likelihoods"]["y"].shape == (1, 320, size // 16, size // 16)
    assert coded["likelihoods"]["z"].shape == (1, 256, size // 64, size // 64)
    assert all(torch.isfinite(tensor).all() for tensor in (coded["x_hat"], *coded["likelihoods"].values()))
    assert all(((p > 0) & (p <= 1)).all() for p in coded["likelihoods"].values())


def test_comparison_of_all_phases(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [sum(p.numel() for p in full_size(phase).parameters()) for phase in range(5)]
    with capsys.disabled():
        print("\nphase   parameters (base)   RWKV components")
        for phase, count in enumerate(parameters):
            rwkv = [name for name, kind in KINDS[phase].items() if kind is not BASELINE[name]]
            print(f"{phase}       {count / 1e6:8.1f} M          {', '.join(rwkv)}")
    assert parameters[0] == 68_505_299
    assert parameters == sorted(parameters)
