"""The codec's networks: sizes, batches, modes, gradients, presets and configurations."""

import json

import pytest
import torch
from torch import Tensor, nn

from modules import HPCM, HPCM_Phase4, HPCMConfig, preset_config
from modules.context.attention import NoAttentionKind
from modules.context.rwkv_kinds import RWKVContextKind
from modules.loading import codec_tensors

PHASES = range(5)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [(128, 128), (1, 1), (130, 257), (100, 200)])
@torch.no_grad()
def test_images_of_any_size(codecs: list[HPCM], phase: int, size: tuple[int, int]) -> None:
    coded = codecs[phase](torch.rand(1, 3, *size))
    assert coded["x_hat"].shape == (1, 3, *size)
    y_shape, z_shape = codecs[phase].latent_shapes(*size)
    assert coded["likelihoods"]["y"].shape == (1, *y_shape)
    assert coded["likelihoods"]["z"].shape == (1, *z_shape)


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_images_of_a_batch_are_independent(codecs: list[HPCM], phase: int) -> None:
    model, images = HPCM(codecs[phase].config).eval().double(), torch.rand(3, 3, 128, 128, dtype=torch.float64)
    together, alone = model(images), [model(image[None]) for image in images]
    torch.testing.assert_close(together["x_hat"], torch.cat([one["x_hat"] for one in alone]))
    torch.testing.assert_close(together["likelihoods"]["y"], torch.cat([one["likelihoods"]["y"] for one in alone]))


@torch.no_grad()
def test_the_argument_training_overrides_the_mode(codecs: list[HPCM], picture: Tensor) -> None:
    model = HPCM(codecs[0].config).eval()
    still, again, noisy = model(picture), model(picture), model(picture, training=True)
    model.train()
    own_mode, forced = model(picture), model(picture, training=False)
    likelihood = [coded["likelihoods"]["y"] for coded in (still, again, noisy, own_mode, forced)]
    assert torch.equal(likelihood[0], likelihood[1])
    assert torch.equal(likelihood[0], likelihood[4])
    assert not torch.equal(likelihood[0], likelihood[2])
    assert not torch.equal(likelihood[2], likelihood[3])
    torch.testing.assert_close(still["x_hat"], noisy["x_hat"])


def modules_with_gradients(model: HPCM, loss: Tensor) -> set[str]:
    """Top-level names whose parameters receive a gradient other than zero."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    named = zip(dict(model.named_parameters()), gradients, strict=True)
    return {name.split(".")[0] for name, gradient in named if gradient is not None and gradient.any()}


@pytest.mark.parametrize("phase", PHASES)
def test_distortion_trains_the_transforms_and_rate_all_but_the_synthesis(codecs: list[HPCM], phase: int) -> None:
    model = HPCM(codecs[phase].config)
    coded = model(torch.rand(1, 3, 128, 128))
    assert modules_with_gradients(model, coded["x_hat"].square().mean()) == {"g_a", "g_s"}
    rate = sum(-likelihood.log2().sum() for likelihood in coded["likelihoods"].values())
    everything = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert modules_with_gradients(model, rate) == everything - {"g_s"}


def test_padding_follows_the_attention_windows() -> None:
    factors = [HPCM.on_meta(preset_config("base", phase)).downsampling_factor for phase in PHASES]
    assert factors == [256, 256, 128, 128, 128]


def test_named_constructors_take_overrides() -> None:
    with torch.device("meta"):
        model = HPCM_Phase4(M=64, N=32)
    assert model.config == preset_config("base", 4, M=64, N=32)
    assert model.means_hyper.shape == (1, 32, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (("bass",), {}, "did you mean 'base'"),
        (("tiny", 5), {}, "unknown phase 5"),
        (("tiny",), {"hidden": 3}, "no setting 'hidden'"),
        (("tiny",), {"M": 50}, "multiple of 8"),
        (("tiny",), {"N": 0}, "N = 0 and widths .* must be positive"),
        (("tiny",), {"attn_s3": {"heads": 7}}, "7 attention heads"),
        (("tiny",), {"attn_s3": {"heads": 0}}, "heads = 0 of the kind 'cross-attention'"),
        (("tiny",), {"attn_s3": {"head": 8}}, "no setting 'head'; did you mean 'heads'"),
        (("tiny",), {"attn_s3": "rwvk"}, "attn_s3: no kind 'rwvk'; did you mean 'rwkv'"),
        (("tiny",), {"context_net": NoAttentionKind()}, "context_net: 'none' is a kind of attention"),
        (("tiny",), {"prior": {"rwvk": {}}}, "prior: no kind 'rwvk'"),
        (("tiny", 4), {"prior": {"rwkv": {"channel_mix": "dw"}}}, "channel_mix = 'dw'"),
    ],
)
def test_impossible_codecs_are_refused(arguments: tuple, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HPCM.from_preset(*arguments, **overrides)


def test_a_configuration_survives_json() -> None:
    config = preset_config("large", 3, M=64, y_spatial_prior_s3={"blocks": 1}, attention={"rwkv": {"mix_rate": 0.5}})
    assert config.attn_s1 == RWKVContextKind(hidden_rate=2, mix_rate=0.5)
    assert HPCMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_weights_of_other_types(codecs: list[HPCM], dtype: torch.dtype, picture: Tensor) -> None:
    assert HPCM(codecs[4].config).to(dtype).eval()(picture.to(dtype))["x_hat"].dtype == dtype


def test_autocast_keeps_latents_and_likelihoods_in_float32(codecs: list[HPCM], picture: Tensor) -> None:
    model = HPCM(codecs[4].config)
    with torch.autocast("cpu", torch.bfloat16):
        coded = model(picture)
    assert coded["likelihoods"]["y"].dtype == torch.float32
    assert coded["y_hat"].dtype == torch.float32
    coded["likelihoods"]["y"].log2().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_convolutions_run_channels_last(codecs: list[HPCM], picture: Tensor) -> None:
    model, strides = HPCM(codecs[4].config).eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride(1)))
    model(picture)
    assert set(strides) == {1}


def test_tables_must_be_built_before_coding(picture: Tensor) -> None:
    model = HPCM.from_preset("tiny")
    with pytest.raises(RuntimeError, match=r"call update\(\)"):
        model.compress(picture)
    assert model.update()
    assert not model.update()


@torch.no_grad()
def test_an_update_after_the_weights_changed_builds_the_tables_that_a_decoder_builds(picture: Tensor) -> None:
    model = HPCM.from_preset("tiny").eval()
    model.update()
    model.scales_hyper.mul_(3)
    assert model.update()
    decoder = HPCM.from_tensors(model.config.to_dict(), codec_tensors(model), {})
    assert decoder.decompress(**model.compress(picture))["x_hat"].shape == picture.shape


def test_weights_load_with_tables_built_or_empty(codecs: list[HPCM]) -> None:
    built, empty = (HPCM(codecs[0].config) for _ in range(2))
    built.update()
    empty_state = empty.state_dict()
    empty.load_state_dict(built.state_dict())
    assert torch.equal(empty.quantized_cdf_y, built.quantized_cdf_y)
    built.load_state_dict(empty_state)
    assert len(built.scale_table) == 0
