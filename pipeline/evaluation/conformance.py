"""`hpcm verify`: whether this machine reads the committed streams as the machine did that wrote them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from modules import HPCM
from modules.bitstream import BitstreamError, CodedImage, ImageCodec
from modules.coding import trace
from modules.guards import Summary, scale_error
from modules.recovery import in_float64
from pipeline.common.errors import UserError
from pipeline.common.files import write_json
from pipeline.evaluation.codec_files import SUFFIX, to_8_bits
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.shipped import WEIGHTS

STREAMS = WEIGHTS / "conformance"
REFERENCE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """What a stream holds: its model's file, SHA-256 of the coding tables, and of y's symbols, step after step."""

    model: str
    tables: str
    symbols: str


@dataclass(frozen=True)
class Outcome:
    """How one stream was read here; `fault` is "" where it was read as it should be."""

    name: str
    model: str
    size: tuple[int, int]
    epsilon: float
    guard_bytes: int
    scale_error: float | None
    """The largest relative error of a scale against this machine's own walk in float64."""
    pixels: int | None
    """Values of the picture, of 3 a pixel, that differ by 1 of 255 from that of the latent decoded in float64."""
    fault: str


def verify(device: torch.device, folder: Path = STREAMS, weights: Path = WEIGHTS) -> Iterator[Outcome]:
    """Read every stream of the suite on `device`, as each comes; raises UserError where there is no suite."""
    if not (folder / REFERENCE).is_file():
        raise UserError(f"{folder}: no {REFERENCE} here, and so nothing to compare with")
    references = {name: Reference(**fields) for name, fields in json.loads((folder / REFERENCE).read_text()).items()}
    codecs: dict[str, ImageCodec] = {}
    for name, reference in references.items():
        if reference.model not in codecs:
            codecs[reference.model] = ImageCodec(load_codec(weights / reference.model).to(device))
        yield _read(codecs[reference.model], name, reference, folder / name)


def _read(codec: ImageCodec, name: str, reference: Reference, path: Path) -> Outcome:
    coded = CodedImage.read(path)
    size, guards = (coded.height, coded.width), Summary.of(coded.y)
    error, pixels, fault = None, None, ""
    try:
        decoded = codec.decode(coded)
        fault = decoded.recovery
        if tables_digest(codec.model) != reference.tables:
            fault = "the coding tables of this model are others here"
        if not fault:
            walk = trace(codec.model, coded.y, coded.z, size)
            exact = in_float64(codec.model)
            exact_walk = trace(exact, coded.y, coded.z, size)
            error = float(scale_error(walk.scales, exact_walk.scales, codec.model.scale_table.cpu()).max())
            fault = "" if symbols_digest(walk.symbols) == reference.symbols else "other symbols than the reference's"
            expected = exact.decompress([[coded.y], [coded.z]], size)["x_hat"]
            difference = (to_8_bits(decoded.x_hat.cpu().double()) - to_8_bits(expected)).abs()
            pixels = int((difference > 0).sum())
            if difference.max() > 1:
                fault = fault or f"the picture differs by {int(difference.max())} of 255"
    except BitstreamError as refusal:
        fault = str(refusal)
    return Outcome(name, reference.model, size, *guards, error, pixels, fault)


def write_suite(images: dict[str, tuple[Tensor, float]], models: Sequence[Path], folder: Path = STREAMS) -> None:
    """Code each image (1, 3, H, W), with its ε, by every model, and keep the hashes of what float64 reads of it."""
    references = {}
    folder.mkdir(exist_ok=True)
    for model in models:
        codec = ImageCodec(load_codec(model))
        exact = in_float64(codec.model)
        for image_name, (image, epsilon) in images.items():
            coded = codec.encode(image, epsilon=epsilon)
            name = f"{model.stem}-{image_name}{SUFFIX}"
            (folder / name).write_bytes(coded.pack())
            walk = trace(exact, coded.y, coded.z, (coded.height, coded.width))
            references[name] = asdict(Reference(model.name, tables_digest(codec.model), symbols_digest(walk.symbols)))
    write_json(folder / REFERENCE, references)


def symbols_digest(symbols: Tensor) -> str:
    """SHA-256 of int32 symbols, hexadecimal."""
    return hashlib.sha256(symbols.int().cpu().numpy().tobytes()).hexdigest()


def tables_digest(model: HPCM) -> str:
    """SHA-256 of the coding tables, hexadecimal."""
    digest = hashlib.sha256()
    for name in model.coding_table_names():
        digest.update(getattr(model, name).cpu().numpy().tobytes())
    return digest.hexdigest()
