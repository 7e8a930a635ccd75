"""Coding steps that are replayed as CUDA graphs: emulated on the CPU, and on a GPU."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_emulation import STATE, CUDAGraph, EmulatedCuda
from mini import with_rates
from torch import Tensor, nn

from modules import HPCM
from modules.bitstream import graphs
from modules.bitstream.file_format import BitstreamError
from modules.bitstream.guards import Guards
from modules.context.coding_order import Step, hierarchy

WARNING = "coding without CUDA graphs from now on: "
Coded = tuple[list[list[bytes]], Tensor]
"""Strings, and the image that was decoded from them."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that has graphs: the GPU, or the CPU with emulated ones."""
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "cuda", EmulatedCuda)
        monkeypatch.setattr(graphs, "DEVICE", "cpu")
        graphs._stream.cache_clear()
    return request.param


@pytest.fixture
def model(codecs: list[HPCM], device: str) -> HPCM:
    """A codec that has coded nothing."""
    return copy.deepcopy(codecs[0]).to(device)


def images(model: HPCM, count: int, height: int = 100, width: int = 120) -> list[Tensor]:
    """Different images on the codec's device."""
    return [torch.rand(1, 3, height, width).to(model.means_hyper) for _ in range(count)]


def coded(model: HPCM, image: Tensor, **settings: Any) -> Coded:
    compressed = model.compress(image, **settings)
    decoded = model.decompress(**compressed)
    assert decoded["recovery"] == [""]
    return compressed["strings"], decoded["x_hat"]


def without_graphs(model: HPCM) -> HPCM:
    other = copy.deepcopy(model)
    other.cuda_graphs = False
    return other


def assert_codes_the_same(model: HPCM, reference: HPCM, image: Tensor, **settings: Any) -> None:
    found, wanted = (coded(one, image, **settings) for one in (model, reference))
    assert found[0] == wanted[0]
    assert torch.equal(found[1], wanted[1])


def single_launches(model: HPCM) -> list[None]:
    """A list that becomes longer when h_s runs, so that it counts walks that are not replays."""
    calls, watched = list[None](), model.h_s

    def count(module: nn.Module, *_: Any) -> None:
        if module is watched:  # A copy has the same hook.
            calls.append(None)

    watched.register_forward_hook(count)
    return calls


def sizes_with_graphs(model: HPCM) -> list[tuple[int, int]]:
    """The sizes of ẑ that have graphs."""
    return [(shape[2], shape[3]) for shape, *_ in graphs._graphs[model].walks]


@pytest.mark.parametrize("phase", [0, 4])
def test_replays_code_other_images_and_guards_as_single_launches_do(
    codecs: list[HPCM], device: str, phase: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, graphs.__name__)
    model = copy.deepcopy(codecs[phase]).to(device)
    reference, calls = without_graphs(model), single_launches(model)
    for image, epsilon in zip(images(model, 3), (2e-5, 0, 1e-3), strict=True):
        hierarchy.cache_clear()  # as images of many sizes do
        assert_codes_the_same(model, reference, image, epsilon=epsilon)
    # The first walk; the second one, a walk that warms up, and the capture; the third one.
    assert len(calls) == 1 + 3 + 1
    assert caplog.messages == ["capturing the coding steps as CUDA graphs, for latents of 8 × 8"]
    (y,), (z,) = model.compress(image)["strings"]
    traces = [one.trace(y, z, (100, 120)) for one in (model, reference)]
    assert all(map(torch.equal, *traces))
    assert len(calls) == 5


def test_replays_code_other_qualities_as_single_launches_do(codecs: list[HPCM], device: str) -> None:
    model = with_rates(codecs[0], (0.004, 0.013, 0.04)).to(device)
    with torch.no_grad():
        for vectors in model.rate_vectors.parameters():
            vectors += 0.1 * torch.randn_like(vectors)
    model.update()
    reference, calls = without_graphs(model), single_launches(model)
    for image, quality in zip(images(model, 3), (1.5, 3.0, 1.0), strict=True):
        assert_codes_the_same(model, reference, image, quality=quality)
    assert len(calls) == 5
    assert model.quality == 2


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: x * float(x.isfinite().all()),
        lambda x: x * torch.as_tensor(1.0, device=x.device),
        lambda x: x + 0 * x[x > 0].sum(),
    ],
    ids=["a value that the processor reads", "a number from the processor", "a number of elements"],
)
def test_a_network_that_no_graph_can_hold_is_coded_without_graphs(
    model: HPCM, layer: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model.attn_s2.register_forward_hook(lambda module, inputs, output: layer(output))
    reference = without_graphs(model)
    for image in images(model, 2):
        assert_codes_the_same(model, reference, image)
    assert not model.cuda_graphs
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.startswith(WARNING)
    assert "captur" in warning
    assert "\n" not in warning
    assert set(STATE.values()) == {"usual"}
    torch.rand(1, device=image.device)  # On a GPU this fails if the generator still expects a capture.


def test_graphs_that_keep_a_value_of_the_second_image_are_not_used(
    model: HPCM, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = iter((1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5))  # from the first walk of the third image on, another
    reference = without_graphs(model)
    model.h_s.register_forward_hook(lambda module, inputs, output: output * next(numbers))
    first, second, third = images(model, 3)
    for image in (first, second):
        model.compress(image)
    assert sizes_with_graphs(model) == [(2, 2)]
    strings = model.compress(third)["strings"]
    assert not model.cuda_graphs
    assert caplog.messages[-1] == WARNING + "they do not compute the same bits as single launches"
    reference.h_s.register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert strings == reference.compress(third)["strings"]


def make_wrong(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the replay of this number, from 1, compute wrong scales and means, or after the last step a wrong ŷ."""
    replay, replayed = CUDAGraph.replay, list[CUDAGraph]()

    def wrong(graph: CUDAGraph) -> None:
        replay(graph)
        replayed.append(graph)
        if len(replayed) == number:
            last = next(call for call in reversed(graph.calls) if "empty" not in str(call.operator))
            last.results[0].mul_(1.5)

    monkeypatch.setattr(CUDAGraph, "replay", wrong)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("number", [1, 5, 12, 23])
def test_graphs_that_compute_other_bits_are_not_used(
    model: HPCM, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reference = without_graphs(model)
    make_wrong(monkeypatch, number)
    for image in images(model, 2):
        assert_codes_the_same(model, reference, image)
    assert not model.cuda_graphs
    assert caplog.messages == [WARNING + "they do not compute the same bits as single launches"]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_decoder_whose_replay_goes_wrong_recovers_the_image(model: HPCM, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = without_graphs(model)
    for image in images(model, 2):
        assert_codes_the_same(model, reference, image)
    compressed = model.compress(image)
    make_wrong(monkeypatch, 5)
    decoded = model.decompress(**compressed)
    assert "decoded in float64: at coding step 5 of 11" in decoded["recovery"][0]
    torch.testing.assert_close(decoded["x_hat"], reference.decompress(**compressed)["x_hat"], rtol=0, atol=1e-3)


def test_a_file_that_is_damaged_in_the_middle_is_refused_and_the_next_is_decoded(model: HPCM) -> None:
    reference = without_graphs(model)
    for image in images(model, 2):
        assert_codes_the_same(model, reference, image)
    (y,), strings_z = model.compress(image)["strings"]
    guards, stream = Guards.parse(y, model.config.M * 64)
    damaged = guards.pack() + stream[: len(stream) // 2] + bytes(len(stream) - len(stream) // 2)
    messages = []
    for one in (model, reference):
        with pytest.raises(BitstreamError, match=r"coding step ([5-9]|1\d) of 11") as error:
            one.decompress([[damaged], strings_z], (100, 120))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert_codes_the_same(model, reference, image)


def test_the_graphs_of_the_least_recent_sizes_are_dropped(model: HPCM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_POSITIONS", 200)
    reference, calls = without_graphs(model), single_launches(model)
    small, wide, high, large = (images(model, 1, *size)[0] for size in ((8, 8), (9, 129), (129, 9), (129, 257)))
    for image, sizes in (
        (small, [(2, 2)]),
        (wide, [(2, 2), (2, 4)]),
        (small, [(2, 4), (2, 2)]),
        (high, [(2, 2), (4, 2)]),
        (large, [(2, 2), (4, 2)]),
    ):
        for _ in range(2):
            assert_codes_the_same(model, reference, image)
        assert sizes_with_graphs(model) == sizes
    assert len(calls) == 3 * 5 + 4


def test_replays_follow_weights_that_are_changed_in_place(model: HPCM) -> None:
    for image in images(model, 2):
        coded(model, image)
    calls = single_launches(model)
    with torch.no_grad():
        for weight in model.attn_s3.parameters():
            weight *= 1.1
    assert_codes_the_same(model, without_graphs(model), image)
    assert not calls


def assign(model: HPCM) -> None:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def replace(model: HPCM) -> None:
    model.attn_s3 = copy.deepcopy(model.attn_s3)


@pytest.mark.parametrize("change", [assign, replace, HPCM.double, HPCM.update, HPCM.train])
def test_graphs_are_captured_again_after_weights_have_moved(model: HPCM, change: Callable[[HPCM], object]) -> None:
    coded(model, *images(model, 1))
    calls = single_launches(model)
    change(model)
    for image in images(model, 2):
        assert_codes_the_same(model, without_graphs(model), image)
    assert len(calls) == 5


def test_graphs_end_with_their_codec(codecs: list[HPCM], device: str) -> None:
    model = copy.deepcopy(codecs[0]).to(device)
    coded(model, *images(model, 1))
    held = weakref.ref(graphs._graphs[model])
    assert sizes_with_graphs(model) == [(2, 2)]
    del model
    gc.collect()
    assert held() is None


def test_graphs_that_inference_mode_captured_serve_outside_of_it(model: HPCM) -> None:
    reference, calls = without_graphs(model), single_launches(model)
    with torch.inference_mode():
        for image in images(model, 2):
            assert_codes_the_same(model, reference, image)
    assert_codes_the_same(model, reference, image)
    assert len(calls) == 5


@torch.no_grad()
def test_the_next_replay_changes_nothing_of_what_one_has_returned(model: HPCM) -> None:
    def found(z_hat: Tensor) -> list[Tensor]:
        scales: list[Tensor] = []

        def code(step: Step, scales_of_step: Tensor, means: Tensor) -> Tensor:
            scales.append(scales_of_step)
            return means

        return [graphs.walk(model, z_hat, code), *scales]

    one, other = torch.randn(2, 1, model.config.N, 2, 2).to(model.means_hyper)
    expected = found(one)
    for _ in range(graphs.CHECKS):
        found(one)
    replayed = found(one)
    found(other)
    assert all(map(torch.equal, replayed, expected))


def test_while_one_thread_uses_graphs_another_codes_without(model: HPCM) -> None:
    reference, calls = without_graphs(model), single_launches(model)
    with graphs._lock:
        for image in images(model, 2):
            assert_codes_the_same(model, reference, image)
    assert model not in graphs._graphs
    assert len(calls) == 4
