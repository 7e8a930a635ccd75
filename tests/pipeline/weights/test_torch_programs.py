"""Exported programs compute the same as the codec, in a process that has only PyTorch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mini import ENVIRONMENT, mini_codec

from modules import HPCM, preset_config
from modules.biwkv4.decomposed import biwkv4_decomposed
from modules.biwkv4.op import biwkv4_reference
from pipeline.weights import torch_programs
from pipeline.weights.checkpoints import CheckpointError, publish
from pipeline.weights.published import Lineage

ELSEWHERE = """
import json, sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
sys.path[:] = [path for path in sys.path if "site-packages" in path or "python3" in path]
sys.path.insert(0, str(folder))
from runtime import ExportedCodec
codec, expected = ExportedCodec(folder), torch.load(folder / "expected.pt")
z, steps = codec.encode(expected["image"])
x_hat = codec.decode(z, lambda number, scales: steps[number].symbols)
assert not {"modules", "pipeline", "compressai"} & {name.split(".")[0] for name in sys.modules}
assert all(step.symbols.shape == step.scales.shape for step in steps)
difference = float((x_hat - expected["x_hat"]).abs().max())
print(json.dumps({"steps": [bool(step.symbols.any()) for step in steps], "difference": difference}))
"""


def small_codec() -> HPCM:
    """A codec with one Bi-WKV4 and one windowed attention, which exports in seconds."""
    sizes: dict[str, Any] = {"M": 16, "N": 8, "widths": (8, 8, 16), "depths": (0, 0, 1), "attn_s1": "none"}
    windows = {"kind": "cross-attention", "heads": 4, "window": 4}
    narrow = {"attention": {"rwkv": {"hidden_rate": 1}}, "prior": {"dwconv": {"blocks": 0, "last_blocks": 1}}}
    model = HPCM(preset_config("tiny", 1, **sizes, attn_s2=windows, **narrow)).eval()
    return with_symbols(model)


def with_symbols(model: HPCM) -> HPCM:
    with torch.no_grad():
        model.g_a.branch[-1].weight *= 30  # so that no step codes zeros alone
    model.update()
    return model


def exported(model: HPCM, folder: Path, keep_op: bool = False) -> Path:
    publish(folder / "codec.safetensors", model, Lineage(name="codec"))
    torch_programs.export_programs(folder / "codec.safetensors", folder / "programs", keep_op)
    factor = model.downsampling_factor
    image = torch.rand(1, 3, 2 * factor, 2 * factor)  # another size than the one that was traced
    with torch.no_grad():
        x_hat = model(image)["x_hat"].clamp(0, 1)
    torch.save({"image": image, "x_hat": x_hat}, folder / "programs" / "expected.pt")
    return folder / "programs"


def run_elsewhere(folder: Path) -> dict[str, Any]:
    """Run the programs without this package. Returns whether each step has symbols, and the difference of the image."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    environment = {**ENVIRONMENT, "PYTHONPATH": ""}
    done = subprocess.run(command, check=True, cwd=folder, env=environment, timeout=240, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_programs_run_without_this_package(tmp_path: Path) -> None:
    found = run_elsewhere(exported(small_codec(), tmp_path))
    assert found["steps"] == [True] * 11
    assert found["difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_programs_of_a_phase_4_run_without_this_package(tmp_path: Path) -> None:
    found = run_elsewhere(exported(with_symbols(mini_codec(4).eval()), tmp_path))
    assert found["steps"] == [True] * 11
    assert found["difference"] < 1e-5


def test_the_op_stays_where_it_is_asked_for() -> None:
    model = small_codec()
    cell = torch_programs.networks(model)["step_s3"]
    program = torch_programs.program(cell, keep_op=True)
    assert any(node.target is torch_programs.BIWKV4 for node in program.graph.nodes)
    for found, wanted in zip(program.module()(*cell.inputs), cell.module(*cell.inputs), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("length", [1, 2, 65, 1000])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_the_decomposed_op_is_the_op(length: int, spread: float) -> None:
    k, v = spread * torch.randn(2, length, 5), torch.randn(2, length, 5)
    w, u = torch.tensor([-1.0, 0, 1, 16, 60]) / length, torch.randn(5)
    expected = biwkv4_reference(w.double(), u.double(), k.double(), v.double()).float()
    torch.testing.assert_close(biwkv4_decomposed(w, u, k, v), expected, atol=1e-6, rtol=1e-6)


def test_a_folder_in_use_is_not_written_to(tmp_path: Path) -> None:
    publish(tmp_path / "codec.safetensors", small_codec(), Lineage(name="codec"))
    with pytest.raises(CheckpointError, match="exists; give a new or an empty folder"):
        torch_programs.export_programs(tmp_path / "codec.safetensors", tmp_path)


def test_missing_packages_are_named_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_programs, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(CheckpointError, match="ONNX needs onnxscript: run pip install 'hpcm-rwkv"):
        torch_programs.export_onnx(tmp_path / "codec.safetensors", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_codec()
    publish(tmp_path / "codec.safetensors", model, Lineage(name="codec"))
    outcomes = torch_programs.export_onnx(tmp_path / "codec.safetensors", tmp_path / "onnx")
    assert set(outcomes.values()) == {""}
    for name, network in torch_programs.networks(model).items():
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{name}.onnx"))
        inputs = [
            torch.randn(1, x.shape[1], 3 * multiple, 2 * multiple) if multiple else x
            for x, multiple in zip(network.inputs, network.multiples, strict=True)
        ]
        given = {known.name: x.numpy() for known, x in zip(session.get_inputs(), inputs, strict=True)}
        with torch.no_grad():
            expected = network.module(*inputs)
        for found, wanted in zip(session.run(None, given), torch.utils._pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
