"""The codec's networks: sizes, batches, modes, gradients, presets and configurations."""

import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from modules import HPCM, HPCM_Phase4, HPCMConfig, Noise, preset_config
from modules.context.attention import CrossAttentionCell, NoAttentionKind
from modules.context.rwkv_kinds import RWKVContextKind

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
def test_memory_layout_of_images_does_not_matter(codecs: list[HPCM], picture: Tensor) -> None:
    plain, channels_last = picture.contiguous(), picture.to(memory_format=torch.channels_last)
    assert torch.equal(codecs[4](plain)["x_hat"], codecs[4](channels_last)["x_hat"])


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


@torch.no_grad()
def test_given_noise_determines_the_likelihoods(codecs: list[HPCM], picture: Tensor) -> None:
    noise = Noise(*(torch.rand(1, *shape) - 0.5 for shape in codecs[2].latent_shapes(256, 256)))
    first, second = (codecs[2](picture, training=True, noise=noise)["likelihoods"] for _ in range(2))
    assert torch.equal(first["y"], second["y"])
    assert torch.equal(first["z"], second["z"])


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


def test_components_run_in_their_order(picture: Tensor, codecs: list[HPCM]) -> None:
    model, order, attended = HPCM(codecs[0].config).eval(), [], []
    for scale in (1, 2, 3):
        for index, adaptor in enumerate(getattr(model, f"y_spatial_prior_adaptor_list_s{scale}")):
            adaptor.register_forward_hook(lambda *_, at=(scale, index): order.append(at))
        getattr(model, f"attn_s{scale}").register_forward_hook(lambda *_, scale=scale: attended.append(scale))
    number = {id(q): index for index, q in enumerate(model.adaptive_params_list)}
    for prior in (model.y_spatial_prior_s1_s2, model.y_spatial_prior_s3):
        prior.register_forward_pre_hook(lambda _, inputs: order.append(number[id(inputs[1])]))
    with torch.no_grad():
        model(picture)
    adaptors = [(1, 0), (2, 2), (2, 0), (2, 1), (3, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
    assert order == list(itertools.chain.from_iterable(zip(adaptors, range(10), strict=True)))
    assert attended == [1, 2, 2, 2, 3, 3, 3, 3, 3]  # No step needs the context after the last.


def test_cross_attention_matches_its_formula() -> None:
    cell = CrossAttentionCell(12, heads=3, window=4).double()
    x, h = torch.randn(2, 2, 12, 8, 12, dtype=torch.float64)
    q, k, v = cell.conv_q(x), cell.conv_k(h), cell.conv_v(h)
    expected = torch.empty_like(x)
    for i, j, head in itertools.product(range(0, 8, 4), range(0, 12, 4), range(3)):
        tile = (slice(None), slice(4 * head, 4 * head + 4), slice(i, i + 4), slice(j, j + 4))
        tq, tk, tv = (t[tile].flatten(2) for t in (q, k, v))
        weights = torch.softmax(tq.transpose(1, 2) @ tk / 2, dim=-1)
        expected[tile] = (tv @ weights.transpose(1, 2)).unflatten(2, (4, 4))
    torch.testing.assert_close(cell(x, h), expected + cell.conv_out(x))


def test_padding_follows_the_attention_windows() -> None:
    factors = [HPCM.on_meta(preset_config("base", phase)).downsampling_factor for phase in PHASES]
    assert factors == [256, 256, 128, 128, 128]


def test_phi_context_has_no_attention() -> None:
    model = HPCM(preset_config("phi-context", M=32, N=16, widths=(8, 8, 8)))
    assert not any(name.startswith("attn") for name in model.state_dict())
    assert model(torch.rand(1, 3, 128, 128))["x_hat"].shape == (1, 3, 128, 128)


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


def test_weights_load_with_tables_built_or_empty(codecs: list[HPCM]) -> None:
    built, empty = (HPCM(codecs[0].config) for _ in range(2))
    built.update()
    empty_state = empty.state_dict()
    empty.load_state_dict(built.state_dict())
    assert torch.equal(empty.quantized_cdf_y, built.quantized_cdf_y)
    built.load_state_dict(empty_state)
    assert len(built.scale_table) == 0
