"""Encodes files under one floating-point configuration and decodes them under others: `make portability`.

Instruction sets, libraries and numbers of threads sum in different orders, so they round differently. Each
configuration runs in a process of its own. A folder holds what the processes share: `codecs/*.pt`, `images/*.pt`, and
for each configuration the files that it wrote and what it decoded.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modules import HPCM, HPCMConfig
from modules.bitstream.coders import StepMismatch
from modules.bitstream.file_format import BitstreamError, CodedImage
from modules.bitstream.guards import scale_error, table_index
from modules.biwkv4 import op
from modules.image_codec import ImageCodec
from modules.layers.entropy import scale_table


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


def save_codec(model: HPCM, path: Path) -> None:
    """Save a codec for the other processes, which would draw other weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": model.config.to_dict(), "state": model.state_dict()}, path)


def prepare(folder: Path) -> None:
    """The bundled codecs, the five phases with random weights, and a photograph of 256×256."""
    from skimage.data import coffee

    from pipeline.weights.checkpoints import load_codec
    from pipeline.weights.shipped import WEIGHTS

    for path in WEIGHTS.glob("*.safetensors"):
        save_codec(load_codec(path), folder / "codecs" / f"{path.stem}.pt")
    torch.manual_seed(0)
    for phase in range(5):
        save_codec(HPCM.from_preset("tiny", phase), folder / "codecs" / f"tiny{phase}.pt")
    (folder / "images").mkdir()
    image = torch.from_numpy(coffee()[100:356, 150:406].copy()).permute(2, 0, 1)[None] / 255
    torch.save(image, folder / "images" / "coffee.pt")


def _load(path: Path, configuration: Configuration) -> ImageCodec:
    saved = torch.load(path, weights_only=True)
    model = HPCM(HPCMConfig.from_dict(saved["config"])).eval()
    model.load_state_dict(saved["state"])
    configuration.prepare(model)
    return ImageCodec(model)


def _codecs(folder: Path, configuration: Configuration) -> Iterator[tuple[str, ImageCodec]]:
    for path in sorted((folder / "codecs").glob("*.pt")):
        yield path.stem, _load(path, configuration)


def encode_all(folder: Path, name: str) -> None:
    """Write every image with every codec; `name` is this process's configuration."""
    target = folder / "files" / name
    target.mkdir(parents=True, exist_ok=True)
    for codec_name, codec in _codecs(folder, CONFIGURATIONS[name]):
        for path in sorted((folder / "images").glob("*.pt")):
            image = torch.load(path, weights_only=True).to(codec.model.means_hyper)
            (target / f"{codec_name}@{path.stem}.hpcm").write_bytes(codec.encode(image).pack())


def decode_all(folder: Path, name: str) -> None:
    """Decode every file; writes `decoded/<name>/results.json`, and float64 `references/` for the others."""
    read: dict[str, Any] = {}
    references = folder / "references"
    references.mkdir(exist_ok=True)
    for codec_name, codec in _codecs(folder, CONFIGURATIONS[name]):
        known: dict[str, dict[str, Any]] = {}
        for path in sorted((folder / "files").glob(f"*/{codec_name}@*.hpcm")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest not in known:
                known[digest] = _decode(codec, path, references / f"{digest}.pt", name == "float64")
            read[f"{path.parent.name}/{path.name}"] = known[digest]
    (folder / "decoded" / name).mkdir(parents=True, exist_ok=True)
    (folder / "decoded" / name / "results.json").write_text(json.dumps(read, indent=1))


def _decode(codec: ImageCodec, path: Path, reference: Path, exact: bool) -> dict[str, Any]:
    coded = CodedImage.read(path)
    size = coded.height, coded.width
    try:
        scales, symbols, x_hat = (x.cpu() for x in codec.model.trace(coded.y, coded.z, size))
    except StepMismatch:
        try:
            decoded = codec.model.decompress([[coded.y], [coded.z]], size)
        except BitstreamError as error:
            return {"refused": str(error)}
        return {"recovery": decoded["recovery"][0], "symbols": "recovered"}
    pixels = (x_hat * 255).round().byte()
    if exact:
        torch.save({"scales": scales, "pixels": pixels}, reference)
    found = {"symbols": hashlib.sha256(symbols.numpy().tobytes()).hexdigest()}
    if not reference.exists():
        return found
    kept, table = torch.load(reference, weights_only=True), scale_table()
    error = scale_error(scales, kept["scales"], table)
    difference = (pixels.int() - kept["pixels"].int()).abs()
    return {
        **found,
        "scale_error": float(error.max()),
        "median_error": float(error.median()),
        "unguarded": int((table_index(scales, table) != table_index(kept["scales"], table)).sum()),
        "pixels": int((difference > 0).sum()),
        "of": pixels.numel(),
        "largest": int(difference.max()),
    }


PARTS = {"encode": encode_all, "decode": decode_all}


def run_all(folder: Path, names: Sequence[str]) -> None:
    """Encode, then decode, what is not done yet. float64 comes first, because the others are compared with it."""
    for part, done in (("encode", "files"), ("decode", "decoded")):
        for name in sorted(names, key=lambda name: name != "float64"):
            if not (folder / done / name).exists() and start(folder, name, part).wait():
                raise SystemExit(f"{name}: {part} failed")


def start(folder: Path, name: str, *parts: str) -> subprocess.Popen[bytes]:
    """Run parts of the matrix in a process with this configuration."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    environment = {**os.environ, **CONFIGURATIONS[name].environment, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, str(folder), "--process", name, *parts], env=environment
    )


def results(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The result of one configuration for each file, by the names of the encoder and the file."""
    read: dict[str, dict[str, Any]] = json.loads((folder / "decoded" / name / "results.json").read_text())
    return read


def report(folder: Path) -> None:
    """Print, for every pair, the largest relative error of a scale, mismatches without guards, and outcomes."""
    decoded = {path.name: results(folder, path.name) for path in sorted((folder / "decoded").iterdir())}
    symbols: dict[str, set[str]] = {}
    for read in decoded.values():
        for file, result in read.items():
            symbols.setdefault(file, set()).add(result.get("symbols", "refused"))
    print(
        "| encoder | decoder | files | largest error | median | unguarded | recovered | refused | pixels ±1 | largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for encoder in sorted({file.split("/")[0] for file in symbols}):
        for decoder, read in decoded.items():
            some = [result for file, result in read.items() if file.startswith(f"{encoder}/")]
            plain = [result for result in some if "scale_error" in result]
            recovered, refused = (sum(bool(r.get(key)) for r in some) for key in ("recovery", "refused"))
            print(
                f"| {encoder} | {decoder} | {len(some)} | {max(r['scale_error'] for r in plain):.1e} "
                f"| {max(r['median_error'] for r in plain):.1e} | {sum(r['unguarded'] for r in plain)} | {recovered} "
                f"| {refused} | {sum(r['pixels'] for r in plain) / sum(r['of'] for r in plain):.1e} "
                f"| {max(r['largest'] for r in plain)} |"
            )
    print(f"{len(symbols)} files; with more than one reading: {sum(len(found) > 1 for found in symbols.values())}")


def main() -> None:
    """Run the matrix over a folder, or one process of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made, with codecs and an image, where it does not exist")
    parser.add_argument("--process", nargs="+", metavar="NAME PART")
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    if arguments.process:
        name, *parts = arguments.process
        torch.set_num_threads(CONFIGURATIONS[name].threads)
        for part in parts:
            PARTS[part](arguments.folder, name)
    else:
        if not arguments.folder.exists():
            prepare(arguments.folder)
        run_all(arguments.folder, arguments.only or list(CONFIGURATIONS))
        report(arguments.folder)


if __name__ == "__main__":
    main()
