"""Images through encoder and decoder: every phase, any size, other settings of PyTorch; and weights without tables."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modules import HPCM, preset_config
from modules.bitstream.determinism import deterministic_float32
from modules.bitstream.guards import table_index
from modules.loading import nearest_config

PHASES = range(5)
PRECISIONS = {
    "all": torch.backends,
    "cudnn": torch.backends.cudnn,
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
}


def precisions() -> dict[str, str]:
    """The settings of float32 arithmetic."""
    return {name: owner.fp32_precision for name, owner in PRECISIONS.items()}


@pytest.fixture
def settings() -> Iterator[None]:
    """Restores the number of threads and the settings of float32 arithmetic."""
    before, threads = precisions(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    for name, owner in PRECISIONS.items():
        owner.fp32_precision = before[name]


@pytest.fixture(scope="module")
def image() -> Tensor:
    from formula import image

    return torch.from_numpy(image("picture", 100, 90))


@torch.no_grad()
def reconstruction(model: HPCM, image: Tensor) -> Tensor:
    return model(image)["x_hat"].clamp(0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("phase", [0, 4])
def test_gpu_and_cpu_decode_each_others_files(phase: int, photo: Tensor) -> None:
    torch.manual_seed(0)
    on_cpu = HPCM.from_preset("tiny", phase).eval()
    on_cpu.update()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    for encoder in (on_cpu, on_gpu):
        (y,), (z,) = encoder.compress(photo.to(encoder.means_hyper.device))["strings"]
        here, there = (decoder.trace(y, z, (128, 128)) for decoder in (on_cpu, on_gpu))
        assert torch.equal(there.symbols.cpu(), here.symbols)
        torch.testing.assert_close(there.x_hat.cpu(), here.x_hat, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [(1, 1), (129, 300)])
def test_the_decoder_gives_the_encoders_reconstruction(codecs: list[HPCM], phase: int, size: tuple[int, int]) -> None:
    model, image = codecs[phase], torch.rand(1, 3, *size)
    coded = model.compress(image)
    assert tuple(coded["shape"]) == size
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert torch.equal(decoded, reconstruction(model, image))


def test_the_codecs_of_these_tests_have_residuals_beyond_their_tables(codecs: list[HPCM], image: Tensor) -> None:
    for model in codecs:
        (y,), (z,) = model.compress(image)["strings"]
        trace, tables = model.trace(y, z, (100, 90)), model.coding_tables
        reach = tables.y.reach[table_index(trace.scales, tables.scales)]
        assert (trace.symbols.abs() > reach).float().mean() > 0.01


def test_a_batch_is_coded_as_its_images(codecs: list[HPCM], image: Tensor) -> None:
    model, images = codecs[4], torch.cat((image, image.flip(3), image.flip(2)))
    coded = model.compress(images)
    alone = [model.compress(one)["strings"] for one in images.split(1)]
    assert coded["strings"] == [[one[part][0] for one in alone] for part in (0, 1)]
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert torch.equal(decoded, torch.cat([reconstruction(model, one) for one in images.split(1)]))


@pytest.mark.usefixtures("settings")
def test_autocast_changes_nothing_and_the_number_of_threads_only_rounding(codecs: list[HPCM], image: Tensor) -> None:
    model = codecs[4]
    torch.set_num_threads(2)
    coded = model.compress(image)
    expected = reconstruction(model, image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.decompress(**coded)["x_hat"], expected)
    torch.set_num_threads(1)
    decoded = model.decompress(**coded)["x_hat"]
    assert ((decoded - expected) * 255).abs().max() < 0.5


@pytest.mark.usefixtures("settings")
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
def test_precisions_set_by_the_user_have_no_effect_and_are_restored(
    owner: str, precision: str, codecs: list[HPCM], image: Tensor
) -> None:
    model, inside = codecs[4], []
    coded, expected = model.compress(image), reconstruction(model, image)
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


@pytest.mark.usefixtures("settings")
def test_precisions_that_inherit_the_general_one_still_do_afterwards() -> None:
    for precision in ("tf32", "ieee"):
        torch.backends.fp32_precision = precision
        with deterministic_float32(torch.device("cpu")):
            pass
        for name in ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv"):
            assert precisions()[name] == precision


@pytest.mark.parametrize("unit", [1, 16])
@torch.no_grad()
def test_tiles_equal_the_whole_and_need_all_of_their_border(codecs: list[HPCM], unit: int) -> None:
    config = codecs[0].config.changed(depths=(2, 1, 3))
    model = HPCM(config).double()
    transform = model.g_a if unit == 16 else model.g_s
    x = torch.randn(1, 3 if unit == 16 else config.M, 22 * unit, 9 * unit, dtype=torch.float64)
    whole = transform(x)
    transform.tile = 6
    torch.testing.assert_close(transform(x), whole, rtol=0, atol=1e-12)
    transform.halo -= 1
    assert (transform(x) - whole).abs().max() > 1e-9


@pytest.mark.parametrize(("preset", "phase"), [*(("tiny", phase) for phase in PHASES), ("base", 2), ("large", 2)])
def test_shapes_of_weights_determine_preset_and_phase(preset: str, phase: int) -> None:
    config = preset_config(preset, phase)
    assert nearest_config(HPCM.on_meta(config).state_dict()) == config


def test_weights_may_come_without_tables(codecs: list[HPCM], image: Tensor) -> None:
    state = {name: t for name, t in codecs[2].state_dict().items() if name not in HPCM.coding_table_names()}
    model = HPCM.from_state_dict({**state, "config": codecs[2].config.to_dict()}).eval()
    assert model.update()
    assert model.compress(image) == codecs[2].compress(image)
    model.load_state_dict(state)
    assert len(model.quantized_cdf_y) == 0  # They were built from the earlier weights.


def test_no_table_gives_mass_to_the_coders_own_escape(codecs: list[HPCM]) -> None:
    cdfs, lengths, _ = codecs[2].coding_tables.z.lists
    assert all(cdf[-1] == cdf[-2] == 2**16 for cdf in cdfs)
    assert [len(cdf) for cdf in cdfs] == lengths
