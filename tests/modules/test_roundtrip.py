"""Images through encoder and decoder: every phase, any size, other settings around them, CompressAI's own helpers."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from modules import HPCM, preset_config
from modules.bitstream.determinism import deterministic_float32
from modules.bitstream.file_format import BitstreamError
from modules.layers.transforms import ImageTransform
from modules.loading import nearest_config

PHASES = range(5)


@pytest.fixture(scope="module")
def codecs() -> dict[int, HPCM]:
    """The tiny preset with weights that leave large residuals, many of them beyond their tables."""
    torch.manual_seed(2)
    models = {}
    for phase in PHASES:
        model = models[phase] = HPCM.from_preset("tiny", phase).eval()
        with torch.no_grad():
            model.g_a.branch[-1].weight *= 30
            model.h_a.branch[-1].weight *= 10
            model.scales_hyper += torch.rand_like(model.scales_hyper)
            model.means_hyper += torch.randn_like(model.means_hyper)
        model.update()
    return models


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reconstruction(model: HPCM, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)["x_hat"].clamp(0, 1)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [(1, 1), (129, 300)])
def test_the_decoder_gives_the_encoders_reconstruction(
    codecs: dict[int, HPCM], phase: int, size: tuple[int, int]
) -> None:
    model, image = codecs[phase], torch.rand(1, 3, *size)
    coded = model.compress(image)
    assert tuple(coded["shape"]) == size
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert torch.equal(decoded, reconstruction(model, image))


def test_residuals_beyond_the_tables_were_among_them(codecs: dict[int, HPCM]) -> None:
    model = codecs[0]
    with torch.no_grad():
        y = model.g_a(torch.rand(1, 3, 128, 128))
    assert y.abs().max() > 10 * float(-model.offset_y.max())


def test_a_batch_is_its_images(codecs: dict[int, HPCM], picture: Tensor) -> None:
    model, images = codecs[4], torch.cat((picture, picture.flip(3), picture.flip(2)))[:, :, :90, :140]
    coded = model.compress(images)
    alone = [model.compress(image[None])["strings"] for image in images]
    assert coded["strings"] == [[one[part][0] for one in alone] for part in (0, 1)]
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert torch.equal(decoded, torch.cat([reconstruction(model, image[None]) for image in images]))


@pytest.mark.usefixtures("threads")
def test_autocast_around_them_changes_nothing_and_other_threads_rounding_alone(
    codecs: dict[int, HPCM], picture: Tensor
) -> None:
    model = codecs[4]
    torch.set_num_threads(2)
    coded = model.compress(picture)
    expected = reconstruction(model, picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.decompress(**coded)["x_hat"], expected)
    torch.set_num_threads(1)
    decoded = model.decompress(**coded)["x_hat"]
    assert torch.get_num_threads() == 1
    assert ((decoded - expected) * 255).abs().max() < 0.5


PRECISIONS = {
    "all": torch.backends,
    "cudnn": torch.backends.cudnn,
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
}


@pytest.fixture
def precisions() -> Iterator[Callable[[], dict[str, str]]]:
    """What is set for float32 arithmetic; put back afterwards."""

    def read() -> dict[str, str]:
        return {name: owner.fp32_precision for name, owner in PRECISIONS.items()}

    before = read()
    yield read
    torch.set_float32_matmul_precision("highest")
    for name, owner in PRECISIONS.items():
        owner.fp32_precision = before[name]


@pytest.mark.parametrize(
    ("owner", "precision"),
    [
        ("all", "tf32"),
        ("cuda.matmul", "tf32"),
        ("cudnn.conv", "ieee"),
        ("mkldnn.matmul", "bf16"),
        ("mkldnn.conv", "bf16"),
        ("legacy", "medium"),
        ("legacy", "highest"),
    ],
)
def test_precisions_around_them_change_nothing_and_stay(
    owner: str,
    precision: str,
    codecs: dict[int, HPCM],
    picture: Tensor,
    precisions: Callable[[], dict[str, str]],
) -> None:
    model, inside = codecs[4], []
    coded, expected = model.compress(picture), reconstruction(model, picture)
    if owner == "legacy":
        torch.set_float32_matmul_precision(precision)
    else:
        PRECISIONS[owner].fp32_precision = precision
    before = precisions()
    watching = model.g_s.register_forward_hook(lambda *_: inside.append(precisions()))
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    watching.remove()
    assert torch.equal(decoded, expected)
    assert inside == [dict.fromkeys(PRECISIONS, "ieee")]
    assert precisions() == before
    assert owner != "legacy" or torch.get_float32_matmul_precision() == precision


def test_precisions_that_follow_the_general_one_still_do(precisions: Callable[[], dict[str, str]]) -> None:
    for precision in ("tf32", "ieee"):
        torch.backends.fp32_precision = precision
        with deterministic_float32(torch.device("cpu")):
            pass
        for name in ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv"):
            assert precisions()[name] == precision


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_without_values_are_refused(codecs: dict[int, HPCM], value: float) -> None:
    with pytest.raises(BitstreamError, match="not finite"):
        codecs[0].compress(torch.full((1, 3, 8, 8), value))


@pytest.mark.parametrize("string", [b"", b"\x01", bytes(40), b"\x00" + b"\xff" * 40, b"\xff" * 41])
def test_strings_of_no_encoder_are_refused(codecs: dict[int, HPCM], string: bytes) -> None:
    z = codecs[0].compress(torch.rand(1, 3, 8, 8))["strings"][1][0]
    with pytest.raises(BitstreamError, match="damaged"):
        codecs[0].decompress([[string], [z]], (8, 8))


@pytest.mark.parametrize("unit", [1, 16])
def test_tiles_make_up_the_whole_and_need_all_of_their_halo(unit: int) -> None:
    config = preset_config("tiny", widths=(8, 8, 16), depths=(2, 1, 3))
    model = HPCM(config).double()
    transform: ImageTransform = model.g_a if unit == 16 else model.g_s
    with torch.no_grad():
        x = torch.randn(1, 3 if unit == 16 else config.M, 22 * unit, 9 * unit, dtype=torch.float64)
        whole = transform(x)
        transform.tile = 6
        torch.testing.assert_close(transform(x), whole, rtol=0, atol=1e-12)
        transform.halo -= 1
        assert (transform(x) - whole).abs().max() > 1e-9


@pytest.mark.parametrize("phase", PHASES)
def test_preset_and_phase_follow_from_the_weights(codecs: dict[int, HPCM], phase: int) -> None:
    model = HPCM.from_state_dict(codecs[phase].state_dict())
    assert model.config == preset_config("tiny", phase)
    assert all(torch.equal(tensor, codecs[phase].state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_may_come_without_tables(codecs: dict[int, HPCM], picture: Tensor) -> None:
    state = {name: t for name, t in codecs[2].state_dict().items() if name not in HPCM.coding_table_names()}
    model = HPCM.from_state_dict(state).eval()
    assert model.update()
    assert model.compress(picture) == codecs[2].compress(picture)
    model.load_state_dict(state)
    assert len(model.quantized_cdf_y) == 0  # they were of the weights before


@pytest.mark.parametrize("preset", ["base", "large", "phi-context"])
def test_presets_follow_from_the_shapes(preset: str) -> None:
    nearest = nearest_config(HPCM.on_meta(preset_config(preset, 2)).state_dict())
    if preset == "phi-context":  # which from Phase 2 on is Base
        preset = "base"
    assert nearest == preset_config(preset, 2)


def test_weights_of_no_preset_are_named(codecs: dict[int, HPCM]) -> None:
    state = {name: tensor for name, tensor in codecs[1].state_dict().items() if name != "h_s.branch.0.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*h_s\.branch\.0\.bias"):
        HPCM.from_state_dict(state)


def test_no_table_gives_mass_to_the_coders_own_escape(codecs: dict[int, HPCM]) -> None:
    model = codecs[2]
    tables = model.coding_tables.z
    assert all(cdf[-1] == cdf[-2] == 2**16 for cdf in tables.cdfs)
    assert all(len(cdf) == length for cdf, length in zip(tables.cdfs, tables.lengths, strict=True))
