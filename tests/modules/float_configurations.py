"""Encodes files under one floating-point configuration and decodes them under others: `make portability`.

Instruction sets, libraries and numbers of threads sum in different orders, so they round differently. Each
configuration runs in a process of its own. A folder holds what the processes share: `codecs/*.pt`, `images/*.pt`, and
for each configuration `files/<name>/*.hpcm` and `decoded/<name>.json`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modules import HPCM, HPCMConfig
from modules.bitstream.coders import StepMismatch
from modules.bitstream.coding import in_float64
from modules.bitstream.file_format import BitstreamError, CodedImage
from modules.bitstream.guards import scale_error, table_index
from modules.biwkv4 import op
from modules.image_codec import ImageCodec
from modules.layers.entropy import scale_table

Result = dict[str, Any]


def channels_first(model: HPCM) -> None:
    """Give every convolution its input in the other layout."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def without_kernel(model: HPCM) -> None:
    """Compute Bi-WKV4 by its reference in PyTorch."""
    op._kernels = lambda k: None  # type: ignore[assignment]


def without_onednn(model: HPCM) -> None:
    """Compute convolutions without oneDNN."""
    torch.backends.mkldnn.enabled = False


@dataclass(frozen=True)
class Configuration:
    """The environment and the threads of a process, and the change that it makes to a model."""

    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 2
    prepare: Callable[[HPCM], object] = lambda model: None


CONFIGURATIONS = {
    "default": Configuration(),
    "oneDNN SSE4.1": Configuration({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "oneDNN AVX2": Configuration({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "ATen default": Configuration({"ATEN_CPU_CAPABILITY": "default"}),
    "ATen AVX2": Configuration({"ATEN_CPU_CAPABILITY": "avx2"}),
    "ATen AVX-512": Configuration({"ATEN_CPU_CAPABILITY": "avx512"}),
    "MKL compatible": Configuration({"MKL_CBWR": "COMPATIBLE"}),
    "no oneDNN": Configuration(prepare=without_onednn),
    "1 thread": Configuration(threads=1),
    "3 threads": Configuration(threads=3),
    "channels first": Configuration(prepare=channels_first),
    "no kernel": Configuration(prepare=without_kernel),
    "float64": Configuration(prepare=lambda model: model.double()),
    **({"CUDA": Configuration(prepare=lambda model: model.cuda())} if torch.cuda.is_available() else {}),
}
"""By name. A library that lacks an instruction set here uses the best that the processor has."""


def save_inputs(folder: Path, codecs: dict[str, HPCM], images: dict[str, torch.Tensor]) -> None:
    """Save codecs and images for the other processes, which would draw other weights."""
    for name in ("codecs", "images"):
        (folder / name).mkdir(parents=True)
    for name, model in codecs.items():
        torch.save({"config": model.config.to_dict(), "state": model.state_dict()}, folder / "codecs" / f"{name}.pt")
    for name, image in images.items():
        torch.save(image, folder / "images" / f"{name}.pt")


def _codecs(folder: Path, configuration: Configuration) -> Iterator[tuple[str, ImageCodec]]:
    for path in sorted((folder / "codecs").glob("*.pt")):
        saved = torch.load(path, weights_only=True)
        model = HPCM(HPCMConfig.from_dict(saved["config"])).eval()
        model.load_state_dict(saved["state"])
        configuration.prepare(model)
        yield path.stem, ImageCodec(model)


def encode_all(folder: Path, name: str) -> None:
    """Write every image with every codec; `name` is this process's configuration."""
    target = folder / "files" / name
    target.mkdir(parents=True)
    for codec_name, codec in _codecs(folder, CONFIGURATIONS[name]):
        for path in sorted((folder / "images").glob("*.pt")):
            image = torch.load(path, weights_only=True).to(codec.model.means_hyper)
            (target / f"{codec_name}@{path.stem}.hpcm").write_bytes(codec.encode(image).pack())


def decode_all(folder: Path, name: str) -> None:
    """Decode every file of every configuration; writes `decoded/<name>.json`."""
    read: dict[str, Result] = {}
    (folder / "decoded").mkdir(exist_ok=True)
    for codec_name, codec in _codecs(folder, CONFIGURATIONS[name]):
        exact = in_float64(codec.model)
        for path in sorted((folder / "files").glob(f"*/{codec_name}@*.hpcm")):
            read[f"{path.parent.name}/{path.name}"] = _decode(codec.model, exact, CodedImage.read(path))
    (folder / "decoded" / f"{name}.json").write_text(json.dumps(read, indent=1))


def _decode(model: HPCM, exact: HPCM, coded: CodedImage) -> Result:
    """The symbols' digest and the differences from float64, or how the file was recovered, or why it was refused."""
    arguments = coded.y, coded.z, (coded.height, coded.width)
    try:
        scales, symbols, x_hat = (x.cpu() for x in model.trace(*arguments))
    except StepMismatch:
        try:
            decoded = model.decompress([[coded.y], [coded.z]], (coded.height, coded.width))
        except BitstreamError as error:
            return {"refused": str(error)}
        return {"recovery": decoded["recovery"][0]}
    reference, table = exact.trace(*arguments), scale_table()
    error = scale_error(scales, reference.scales, table)
    difference = ((x_hat * 255).round() - (reference.x_hat * 255).round()).abs()
    return {
        "symbols": hashlib.sha256(symbols.numpy().tobytes()).hexdigest(),
        "scale_error": float(error.max()),
        "median_error": float(error.median()),
        "unguarded": int((table_index(scales, table) != table_index(reference.scales, table)).sum()),
        "pixels": float((difference > 0).double().mean()),
        "largest": int(difference.max()),
    }


def start(folder: Path, name: str, *parts: str) -> subprocess.Popen[bytes]:
    """Run `encode`, `decode` or both in a process with this configuration."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = {**os.environ, **CONFIGURATIONS[name].environment, "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", __file__, str(folder), "--process", name, *parts]
    return subprocess.Popen(command, env=environment)


def run_all(folder: Path, names: Sequence[str]) -> None:
    """Encode, then decode, what is not done yet."""
    for part, done in (("encode", "files/{}"), ("decode", "decoded/{}.json")):
        for name in names:
            if not (folder / done.format(name)).exists() and start(folder, name, part).wait():
                raise SystemExit(f"{name}: {part} failed")


def results(folder: Path, name: str) -> dict[str, Result]:
    """The result of one configuration for each file, by the names of the encoder and the file."""
    read: dict[str, Result] = json.loads((folder / "decoded" / f"{name}.json").read_text())
    return read


def report(folder: Path) -> None:
    """Print for each pair: errors of the scales, tables that differ without guards, outcomes, values that differ."""
    pairs: dict[tuple[str, str], list[Result]] = defaultdict(list)
    readings: dict[str, set[str]] = defaultdict(set)
    for path in sorted((folder / "decoded").iterdir()):
        for file, result in results(folder, path.stem).items():
            readings[file].add(result.get("symbols", "other"))
            pairs[file.split("/")[0], path.stem].append(result)
    print(
        "| encoder | decoder | files | largest error | median | unguarded | recovered | refused | values ±1 | largest |"
    )
    print("|---" * 10 + "|")
    for (encoder, decoder), some in sorted(pairs.items()):
        read = [result for result in some if "symbols" in result]
        errors = [f"{max(result[key] for result in read):.1e}" for key in ("scale_error", "median_error")]
        outcomes = [sum(key in result for result in some) for key in ("recovery", "refused")]
        differing = f"{sum(result['pixels'] for result in read) / len(read):.1e}"
        row = encoder, decoder, len(some), *errors, sum(result["unguarded"] for result in read), *outcomes, differing
        print("|", " | ".join(map(str, row)), "|", max(result["largest"] for result in read), "|")
    print(f"{len(readings)} files; with more than one reading: {sum(len(found) > 1 for found in readings.values())}")


def all_inputs() -> tuple[dict[str, HPCM], dict[str, torch.Tensor]]:
    """The bundled codecs, the five phases with random weights, and a photograph of 256×256."""
    from skimage.data import coffee

    from pipeline.weights.checkpoints import load_codec
    from pipeline.weights.shipped import WEIGHTS

    torch.manual_seed(0)
    codecs = {path.stem: load_codec(path) for path in WEIGHTS.glob("*.safetensors")}
    image = torch.from_numpy(coffee()[100:356, 150:406].copy()).permute(2, 0, 1)[None] / 255
    return codecs | {f"tiny{phase}": HPCM.from_preset("tiny", phase) for phase in range(5)}, {"coffee": image}


def main() -> None:
    """Run the matrix over a folder, or one process of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="created, with codecs and an image, if it does not exist")
    parser.add_argument("--process", nargs="+", metavar="NAME PART")
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    if arguments.process:
        name, *parts = arguments.process
        torch.set_num_threads(CONFIGURATIONS[name].threads)
        for part in parts:
            {"encode": encode_all, "decode": decode_all}[part](arguments.folder, name)
    else:
        if not arguments.folder.exists():
            save_inputs(arguments.folder, *all_inputs())
        run_all(arguments.folder, arguments.only or list(CONFIGURATIONS))
        report(arguments.folder)


if __name__ == "__main__":
    main()
