"""Files coded under one arithmetic and decoded under another, each in a process of its own: `make arithmetics`.

One machine has many arithmetics: instruction sets, libraries and thread counts sum in other orders. A folder holds what
the processes share: `codecs/*.pt`, `images/*.pt`, and for each arithmetic the files it wrote and what it decoded.
"""

import argparse
import contextlib
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
from torch import Tensor, nn

from modules import HPCM, HPCMConfig, biwkv4, coders
from modules.bitstream import BitstreamError, CodedImage, ImageCodec
from modules.entropy import scale_table
from modules.guards import table_index


def channels_first(model: HPCM) -> None:
    """Give every convolution its input in the other layout."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))


def without_kernel(model: HPCM) -> None:
    """Compute Bi-WKV4 by its reference in PyTorch."""
    biwkv4._kernels = lambda k: None


def without_onednn(model: HPCM) -> None:
    """Compute convolutions without oneDNN."""
    torch.backends.mkldnn.enabled = False


@dataclass(frozen=True)
class Arithmetic:
    """Environment of a process, its threads, and what is done to a model in it."""

    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 2
    prepare: Callable[[HPCM], object] = lambda model: None


ARITHMETICS = {
    "default": Arithmetic(),
    "oneDNN SSE4.1": Arithmetic({"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "oneDNN AVX2": Arithmetic({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "ATen default": Arithmetic({"ATEN_CPU_CAPABILITY": "default"}),
    "ATen AVX2": Arithmetic({"ATEN_CPU_CAPABILITY": "avx2"}),
    "ATen AVX-512": Arithmetic({"ATEN_CPU_CAPABILITY": "avx512"}),
    "MKL compatible": Arithmetic({"MKL_CBWR": "COMPATIBLE"}),
    "no oneDNN": Arithmetic(prepare=without_onednn),
    "1 thread": Arithmetic(threads=1),
    "3 threads": Arithmetic(threads=3),
    "channels first": Arithmetic(prepare=channels_first),
    "no kernel": Arithmetic(prepare=without_kernel),
    "float64": Arithmetic(prepare=lambda model: model.double()),
}
"""AVX2 for ATen and SSE4.1 for oneDNN are other code paths; what a machine lacks, it takes as the best it has."""


def save_codec(model: HPCM, path: Path) -> None:
    """Keep a codec for the other processes, which would draw other weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": model.config.to_dict(), "state": model.state_dict()}, path)


def _load(path: Path, arithmetic: Arithmetic) -> ImageCodec:
    saved = torch.load(path, weights_only=True)
    model = HPCM(HPCMConfig.from_dict(saved["config"])).eval()
    model.load_state_dict(saved["state"])
    arithmetic.prepare(model)
    return ImageCodec(model)


def _codecs(folder: Path, arithmetic: Arithmetic) -> Iterator[tuple[str, ImageCodec]]:
    for path in sorted((folder / "codecs").glob("*.pt")):
        yield path.stem, _load(path, arithmetic)


def _identify(codec: ImageCodec, coded: CodedImage) -> CodedImage:
    """In float64 the same weights have another identity: give a file the codec's own."""
    return CodedImage(codec.identity, *(coded.height, coded.width, coded.z, coded.y))


def encode_all(folder: Path, name: str) -> None:
    """Write every image with every codec; `name` is this process's arithmetic."""
    target = folder / "files" / name
    target.mkdir(parents=True, exist_ok=True)
    for codec_name, codec in _codecs(folder, ARITHMETICS[name]):
        for path in sorted((folder / "images").glob("*.pt")):
            image = torch.load(path, weights_only=True).to(codec.model.means_hyper.dtype)
            (target / f"{codec_name}@{path.stem}.hpcm").write_bytes(codec.encode(image).pack())


def decode_all(folder: Path, name: str) -> None:
    """Decode every file; writes `decoded/<name>/results.json`, and float64 `references/` for the others."""
    results: dict[str, Any] = {}
    references = folder / "references"
    references.mkdir(exist_ok=True)
    for codec_name, codec in _codecs(folder, ARITHMETICS[name]):
        known: dict[str, dict[str, Any]] = {}
        for path in sorted((folder / "files").glob(f"*/{codec_name}@*.hpcm")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest not in known:
                known[digest] = _decode(codec, path, references / f"{digest}.pt", name == "float64")
            results[f"{path.parent.name}/{path.name}"] = known[digest]
    (folder / "decoded" / name).mkdir(parents=True, exist_ok=True)
    (folder / "decoded" / name / "results.json").write_text(json.dumps(results, indent=1))


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The scales and symbols of every step that is decoded inside."""
    steps: list[tuple[Tensor, Tensor]] = []
    symbols_of = coders.Decoder._symbols

    def recording(decoder: coders.Decoder, scales: Tensor) -> Tensor | None:
        symbols = symbols_of(decoder, scales)
        if symbols is not None:
            steps.append((scales.flatten(), symbols.flatten()))
        return symbols

    coders.Decoder._symbols = recording  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        coders.Decoder._symbols = symbols_of  # type: ignore[method-assign]


def _decode(codec: ImageCodec, path: Path, reference: Path, exact: bool) -> dict[str, Any]:
    coded = _identify(codec, CodedImage.read(path))
    with recorded() as steps:
        try:
            x_hat, recovery = codec.decode(coded)
        except BitstreamError as error:
            return {"refused": str(error)}
    scales, symbols = (torch.cat(parts) for parts in zip(*steps, strict=True))
    pixels = (x_hat * 255).round().byte()
    if exact:
        torch.save({"scales": scales, "pixels": pixels}, reference)
    found = {"symbols": hashlib.sha256(symbols.numpy().tobytes()).hexdigest(), "recovery": recovery}
    if recovery:  # It was decoded in part twice.
        return found
    kept = torch.load(reference, weights_only=True)
    exact_scales, table = kept["scales"], scale_table()
    # Below the first boundary and above the last, nothing is decided.
    inside = (exact_scales > 0.9 * table[0]) & (exact_scales < 1.1 * table[-1])
    error = ((scales.double() - exact_scales) / exact_scales)[inside].abs()
    difference = (pixels.int() - kept["pixels"].int()).abs()
    return {
        **found,
        "scale_error": float(error.max()),
        "median_error": float(error.median()),
        "unguarded": int((table_index(scales, table) != table_index(exact_scales, table)).sum()),
        "pixels": int((difference > 0).sum()),
        "of": pixels.numel(),
        "largest": int(difference.max()),
    }


def run_all(folder: Path, names: Sequence[str]) -> None:
    """Encode, then decode, in a process for each arithmetic; float64 first, since the others compare with it."""
    for what in ("encode", "decode"):
        for name in sorted(names, key=lambda name: name != "float64"):
            done = (
                folder / ("files" if what == "encode" else "decoded") / (name if what == "encode" else f"{name}.json")
            )
            if not done.exists():
                start(folder, what, name)


def start(folder: Path, what: str, name: str) -> None:
    """Run one part in a process of its own; raises CalledProcessError."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, **ARITHMETICS[name].environment, "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", __file__, str(folder), "--process", what, name]
    subprocess.run(command, env=environment, check=True, capture_output=what == "quiet")


def report(folder: Path) -> None:
    """Print, for every pair, the largest relative error of a scale, mismatches without guards, and outcomes."""
    decoded = {path.parent.name: json.loads(path.read_text()) for path in sorted((folder / "decoded").glob("*/*.json"))}
    symbols: dict[str, set[str]] = {}
    for results in decoded.values():
        for file, result in results.items():
            symbols.setdefault(file, set()).add(result.get("symbols", "refused"))
    print(
        "| encoder | decoder | files | largest error | median | unguarded | recovered | refused | pixels ±1 | largest |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for encoder in sorted({file.split("/")[0] for file in symbols}):
        for decoder, results in decoded.items():
            some = [result for file, result in results.items() if file.startswith(f"{encoder}/")]
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
    parser.add_argument("folder", type=Path)
    parser.add_argument("--process", nargs=2, metavar=("WHAT", "NAME"))
    parser.add_argument("--only", action="append")
    arguments = parser.parse_args()
    if arguments.process:
        what, name = arguments.process
        torch.set_num_threads(ARITHMETICS[name].threads)
        (encode_all if what == "encode" else decode_all)(arguments.folder, name)
    else:
        run_all(arguments.folder, arguments.only or list(ARITHMETICS))
        report(arguments.folder)


if __name__ == "__main__":
    main()
