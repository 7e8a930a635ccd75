"""The codec as a whole: sizes, batches, modes, gradients, presets."""

import itertools
import json

import pytest
import torch
from torch import Tensor, nn

from modules import HPCM, HPCM_Phase4, HPCMConfig, Noise, preset_config
from modules.context.attention import CrossAttentionCell, NoAttentionKind
from modules.context.rwkv_kinds import RWKVContextKind

PHASES = range(5)


@pytest.fixture(scope="module")
def tiny() -> dict[int, HPCM]:
    torch.manual_seed(1)
    return {phase: HPCM.from_preset("tiny", phase).eval() for phase in PHASES}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [(128, 128), (1, 1), (130, 257), (100, 200)])
@torch.no_grad()
def test_any_size_comes_back(tiny: dict[int, HPCM], phase: int, size: tuple[int, int]) -> None:
    coded = tiny[phase](torch.rand(1, 3, *size))
    assert coded["x_hat"].shape == (1, 3, *size)
    y_shape, z_shape = tiny[phase].latent_shapes(*size)
    assert coded["likelihoods"]["y"].shape == (1, *y_shape)
    assert coded["likelihoods"]["z"].shape == (1, *z_shape)


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(tiny: dict[int, HPCM], phase: int) -> None:
    images = torch.rand(3, 3, 128, 128)
    together = tiny[phase].double()(images.double())
    alone = [tiny[phase](image[None].double()) for image in images]
    torch.testing.assert_close(together["x_hat"], torch.cat([one["x_hat"] for one in alone]))
    torch.testing.assert_close(together["likelihoods"]["y"], torch.cat([one["likelihoods"]["y"] for one in alone]))
    tiny[phase].float()


@torch.no_grad()
def test_memory_layout_does_not_matter(tiny: dict[int, HPCM], picture: Tensor) -> None:
    plain, channels_last = picture.contiguous(), picture.to(memory_format=torch.channels_last)
    assert torch.equal(tiny[4](plain)["x_hat"], tiny[4](channels_last)["x_hat"])


def test_training_argument_overrides_the_mode(tiny: dict[int, HPCM], picture: Tensor) -> None:
    model = tiny[0]
    with torch.no_grad():
        still, again = model(picture), model(picture)
        noisy = model(picture, training=True)
        model.train()
        own_mode = model(picture)
        forced = model(picture, training=False)
        model.eval()
    likelihood = [coded["likelihoods"]["y"] for coded in (still, again, noisy, own_mode, forced)]
    assert torch.equal(likelihood[0], likelihood[1])
    assert torch.equal(likelihood[0], likelihood[4])
    assert not torch.equal(likelihood[0], likelihood[2])
    assert not torch.equal(likelihood[2], likelihood[3])
    torch.testing.assert_close(still["x_hat"], noisy["x_hat"])


def test_given_noise_decides_the_likelihoods(tiny: dict[int, HPCM], picture: Tensor) -> None:
    y, z = (torch.rand(1, *shape) - 0.5 for shape in tiny[2].latent_shapes(256, 256))
    with torch.no_grad():
        first, second = (tiny[2](picture, training=True, noise=Noise(y, z)) for _ in range(2))
    assert torch.equal(first["likelihoods"]["y"], second["likelihoods"]["y"])
    assert torch.equal(first["likelihoods"]["z"], second["likelihoods"]["z"])


def gradient_modules(model: HPCM, loss: Tensor) -> set[str]:
    """Top-level names whose parameters receive a gradient other than zero."""
    loss.backward()
    return {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }


@pytest.mark.parametrize("phase", PHASES)
def test_distortion_trains_the_transforms_and_rate_the_rest(phase: int) -> None:
    model, images = HPCM.from_preset("tiny", phase), torch.rand(1, 3, 128, 128)
    coded = model(images)
    assert gradient_modules(model, coded["x_hat"].square().mean()) == {"g_a", "g_s"}
    model.zero_grad()
    coded = model(images)
    rate = sum(-likelihood.log2().sum() for likelihood in coded["likelihoods"].values())
    everything = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert gradient_modules(model, rate) == everything - {"g_s"}


def test_the_last_attention_is_not_computed(picture: Tensor) -> None:
    model, calls = HPCM.from_preset("tiny").eval(), []
    model.attn_s3.register_forward_hook(lambda *_: calls.append("attn_s3"))
    model.y_spatial_prior_s3.register_forward_hook(lambda *_: calls.append("prior"))
    with torch.no_grad():
        model(picture)
    assert calls == ["prior", "attn_s3"] * 5 + ["prior"]


def test_adaptors_and_adaptive_parameters_run_in_their_order(picture: Tensor) -> None:
    model, order = HPCM.from_preset("tiny").eval(), []
    for scale in (1, 2, 3):
        for index, adaptor in enumerate(getattr(model, f"y_spatial_prior_adaptor_list_s{scale}")):
            adaptor.register_forward_hook(lambda *_, at=(scale, index): order.append(at))
    number = {id(q): index for index, q in enumerate(model.adaptive_params_list)}
    for prior in (model.y_spatial_prior_s1_s2, model.y_spatial_prior_s3):
        prior.register_forward_pre_hook(lambda _, inputs: order.append(number[id(inputs[1])]))
    with torch.no_grad():
        model(picture)
    adaptors = [(1, 0), (2, 2), (2, 0), (2, 1), (3, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
    assert order == list(itertools.chain.from_iterable(zip(adaptors, range(10), strict=True)))


def test_cross_attention_is_its_formula() -> None:
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
    factors = [HPCM(preset_config("base", phase, M=32, N=16)).downsampling_factor for phase in PHASES]
    assert factors == [256, 256, 128, 128, 128]


def test_phi_context_hands_the_prior_on() -> None:
    model = HPCM(preset_config("phi-context", M=32, N=16, widths=(8, 8, 8)))
    assert not any(name.startswith("attn") for name in model.state_dict())
    assert model(torch.rand(1, 3, 128, 128))["x_hat"].shape == (1, 3, 128, 128)


def test_named_constructors_take_overrides() -> None:
    with torch.device("meta"):
        model = HPCM_Phase4(M=64, N=32)
    assert model.config == preset_config("base", 4, M=64, N=32)
    assert model.means_hyper.shape == (1, 32, 1, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HPCM.from_preset("bass"), "did you mean 'base'"),
        (lambda: HPCM.from_preset("tiny", 5), "unknown phase 5"),
        (lambda: HPCM.from_preset("tiny", hidden=3), "no setting 'hidden'"),
        (lambda: HPCM.from_preset("tiny", M=50), "multiple of 8"),
        (lambda: HPCM.from_preset("tiny", attn_s3={"heads": 7}), "7 attention heads"),
        (lambda: HPCM.from_preset("tiny", attn_s3={"heads": 0}), "heads = 0 of the kind 'cross-attention'"),
        (lambda: HPCM.from_preset("tiny", attn_s3={"head": 8}), "no setting 'head'; did you mean 'heads'"),
        (lambda: HPCM.from_preset("tiny", attn_s3="rwvk"), "attn_s3: no kind 'rwvk'; did you mean 'rwkv'"),
        (lambda: HPCM.from_preset("tiny", context_net=NoAttentionKind()), "context_net: 'none' is a kind of attention"),
        (lambda: HPCM.from_preset("tiny", prior={"rwvk": {}}), "prior: no kind 'rwvk'"),
        (lambda: HPCM.from_preset("tiny", 4, prior={"rwkv": {"channel_mix": "dw"}}), "channel_mix = 'dw'"),
    ],
)
def test_impossible_codecs_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_configuration_survives_json() -> None:
    config = preset_config("large", 3, M=64, y_spatial_prior_s3={"blocks": 1}, attention={"rwkv": {"mix_rate": 0.5}})
    assert config.attn_s1 == RWKVContextKind(hidden_rate=2, mix_rate=0.5)
    assert HPCMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_any_dtype(dtype: torch.dtype, picture: Tensor) -> None:
    model = HPCM.from_preset("tiny", 4).to(dtype).eval()
    assert model(picture.to(dtype))["x_hat"].dtype == dtype


def test_autocast_keeps_latents_and_likelihoods_in_float32(picture: Tensor) -> None:
    model = HPCM.from_preset("tiny", 4)
    with torch.autocast("cpu", torch.bfloat16):
        coded = model(picture)
    assert coded["likelihoods"]["y"].dtype == torch.float32
    assert coded["y_hat"].dtype == torch.float32
    coded["likelihoods"]["y"].log2().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_convolutions_run_channels_last(picture: Tensor) -> None:
    model, wrong = HPCM.from_preset("tiny", 4).eval(), []

    def check(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].stride(1) != 1:
                wrong.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(check(name))
    with torch.no_grad():
        model(picture)
    assert wrong == []


def test_tables_must_be_built_before_coding(picture: Tensor) -> None:
    model = HPCM.from_preset("tiny")
    with pytest.raises(RuntimeError, match=r"call update\(\)"):
        model.compress(picture)
    assert model.update()
    assert not model.update()


def test_weights_load_with_tables_built_or_empty() -> None:
    built, empty = HPCM.from_preset("tiny"), HPCM.from_preset("tiny")
    built.update()
    empty_state = empty.state_dict()
    empty.load_state_dict(built.state_dict())
    assert torch.equal(empty.quantized_cdf_y, built.quantized_cdf_y)
    built.load_state_dict(empty_state)
    assert len(built.scale_table) == 0
