"""The CUDA kernels of the Bi-WKV4 op. `test_biwkv4.py` tests their phases without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from modules.biwkv4.op import biwkv4
from modules.native_build import SOURCES
from tests.modules.test_biwkv4 import BEYOND, assert_close, assert_same_bits, computed, draw


@pytest.mark.nvcc
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc: the CUDA source is not compiled")
def test_source_compiles_without_spills(tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "0", "-c", str(SOURCES / "gpu" / "biwkv4.cu")]
    command += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (75, 80, 90)]
    done = subprocess.run([*command, "-o", str(tmp_path / "o")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 3 * (3 * 5 + 1)  # architectures, number types, launches
    assert set(spills) == {("0", "0")}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 65, 5), (3, 1000, 130), (1, 4096, 32), (1, 4097, 32), (1, 8160, 32)])
def test_gpu_matches_brute_force(shape, dtype: torch.dtype) -> None:
    inputs, grad_y = draw(shape, dtype, decay=1.5)
    results = computed(tuple(x.cuda() for x in inputs), grad_y.cuda())
    assert_close([x.cpu() for x in results], computed(inputs, grad_y), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("whole", "boost"), BEYOND)
def test_gpu_beyond_the_bound(whole: float, boost: float) -> None:
    (w, u, k, v), grad_y = draw((2, 700, 130), decay=1.5)
    w[3], u[129] = whole / 700, boost
    results = computed(tuple(x.cuda() for x in (w, u, k, v)), grad_y.cuda())
    assert_close([x.cpu() for x in results], computed((w, u, k, v), grad_y), 1e-5)


@pytest.mark.gpu
def test_gpu_is_deterministic_and_reads_views() -> None:
    (w, u, _, _), grad_y = draw((2, 3000, 64))
    fused = torch.randn(2, 3000, 192, device="cuda")
    k, v = fused[..., :64], fused[..., 64:128]
    results = [computed((w.cuda(), u.cuda(), k, v), grad_y.cuda()) for _ in range(3)]
    results.append(computed((w.cuda(), u.cuda(), k.contiguous(), v.contiguous()), grad_y.cuda()))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.gpu
def test_gpu_batch_changes_no_bit() -> None:
    (w, u, k, v), grad_y = draw((40, 4096, 96), torch.bfloat16)
    inputs = tuple(x.cuda() for x in (w, u, k, v))
    y, _, _, dk, dv = computed(inputs, grad_y.cuda())
    one = computed((inputs[0], inputs[1], inputs[2][7:8], inputs[3][7:8]), grad_y[7:8].cuda())
    assert all(torch.equal(a[7:8], b) for a, b in zip((y, dk, dv), (one[0], one[3], one[4]), strict=True))


@pytest.mark.gpu
def test_gpu_opcheck_and_errors() -> None:
    (w, u, k, v), _ = draw((2, 9, 4))
    inputs = [x.cuda().requires_grad_() for x in (w, u, k, v)]
    torch.library.opcheck(torch.ops.hpcm.biwkv4.default, inputs)
    with pytest.raises(ValueError, match="w must be on"):
        biwkv4(w, *inputs[1:])
    with pytest.raises(TypeError, match="k must be"):
        biwkv4(*(x.double() for x in inputs))
