"""CompressAI's own tools evaluate and plot this codec."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compressai.registry import MODELS
from mini import mini_codec
from PIL import Image

from modules import HPCM
from modules.compressai_tools import main
from pipeline.weights.checkpoints import load_codec, publish
from pipeline.weights.export import export_compressai
from pipeline.weights.published import Lineage


@pytest.fixture(autouse=True)
def _settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore what the tools change: arguments and number of threads."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_eval_model_and_plot_take_an_exported_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert MODELS["hpcm"] is HPCM
    checkpoint, weights = tmp_path / "checkpoint.safetensors", tmp_path / "codec.pth.tar"
    publish(checkpoint, mini_codec(4), Lineage(name="phase4"))
    export_compressai(checkpoint, weights)
    (tmp_path / "photos").mkdir()
    image = torch.rand(3, 190, 170)
    Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "photos" / "image.png")
    options = ["-a", "hpcm", "-p", str(weights), "-d", str(tmp_path)]
    for more in ([], ["--entropy-estimation", "-o", "estimated"]):
        main(["eval_model", "checkpoint", str(tmp_path / "photos"), *options, *more])
    real, estimated = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("hpcm-ans", "estimated")
    )
    assert real["psnr-rgb"][0] == pytest.approx(estimated["psnr-rgb"][0], abs=0.05)
    assert math.isfinite(real["ms-ssim-rgb"][0])
    coded = load_codec(checkpoint).compress((image * 255).byte()[None] / 255)
    bits = 8 * sum(len(strings[0]) for strings in coded["strings"])
    assert real["bpp"][0] == pytest.approx(bits / (190 * 170))
    main(["plot", "-f", str(tmp_path / "hpcm-ans.json"), "-o", str(tmp_path / "curve.png")])
    with Image.open(tmp_path / "curve.png") as drawn:
        assert drawn.format == "PNG"
    capsys.readouterr()


def test_a_download_is_refused_and_the_usage_shown(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="no weights of hpcm to download; use `checkpoint`"):
        main(["eval_model", "pretrained", str(tmp_path), "-a", "hpcm"])
    with pytest.raises(SystemExit, match="usage: python -m modules"):
        main([])
