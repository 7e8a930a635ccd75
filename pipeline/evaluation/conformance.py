"""`hpcm verify`: checks that this machine decodes the committed streams as the reference machine did."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modules import HPCM
from modules.bitstream.coding import in_float64
from modules.bitstream.file_format import BitstreamError, CodedImage, LatentHeader
from modules.bitstream.guards import scale_error
from modules.image_codec import ImageCodec
from pipeline.common.errors import UserError
from pipeline.evaluation.codec_files import to_8_bits
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.shipped import WEIGHTS

STREAMS = WEIGHTS / "conformance"
REFERENCE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """A stream's model file, and the SHA-256 of its coding tables and of the symbols of y in coding order."""

    model: str
    tables: str
    symbols: str


@dataclass(frozen=True)
class Outcome:
    """The result of decoding one stream on this machine; `fault` is "" if it is correct."""

    name: str
    model: str
    size: tuple[int, int]
    epsilon: float
    guard_bytes: int
    scale_error: float | None
    """Largest relative error of a scale compared with a float64 pass on this machine."""
    pixels: int | None
    """Number of values (3 per pixel) that differ from the picture decoded in float64; 1 of 255 is allowed."""
    fault: str


def verify(device: torch.device, folder: Path = STREAMS) -> Iterator[Outcome]:
    """Decode the streams of the suite one by one on `device`; raises UserError if there is no suite."""
    if not (folder / REFERENCE).is_file():
        raise UserError(f"{folder}: no {REFERENCE} here to compare with")
    references = {name: Reference(**fields) for name, fields in json.loads((folder / REFERENCE).read_text()).items()}
    codecs: dict[str, ImageCodec] = {}
    for name, reference in references.items():
        if reference.model not in codecs:
            codecs[reference.model] = ImageCodec(load_codec(WEIGHTS / reference.model).to(device))
        yield _read(codecs[reference.model], name, reference, folder / name)


def _read(codec: ImageCodec, name: str, reference: Reference, path: Path) -> Outcome:
    coded = CodedImage.read(path)
    size, guards = (coded.height, coded.width), LatentHeader.of(coded.y)
    error, pixels, fault = None, None, ""
    try:
        codec.check_identity(coded)
        if tables_digest(codec.model) != reference.tables:
            raise BitstreamError("the coding tables of this model differ from the reference")
        here, exact = (model.trace(coded.y, coded.z, size) for model in (codec.model, in_float64(codec.model)))
        error = float(scale_error(here.scales, exact.scales, codec.model.coding_tables.scales.cpu()).max())
        difference = (to_8_bits(here.x_hat.cpu().double()) - to_8_bits(exact.x_hat)).abs()
        pixels = int((difference > 0).sum())
        if symbols_digest(here.symbols) != reference.symbols:
            fault = "the symbols differ from the reference"
        elif difference.max() > 1:
            fault = f"the picture differs by {int(difference.max())} of 255"
    except BitstreamError as refusal:
        fault = str(refusal)
    return Outcome(name, reference.model, size, *guards, error, pixels, fault)


def symbols_digest(symbols: Tensor) -> str:
    """SHA-256 of int32 symbols, in hexadecimal."""
    return hashlib.sha256(symbols.int().cpu().numpy().tobytes()).hexdigest()


def tables_digest(model: HPCM) -> str:
    """SHA-256 of the coding tables, in hexadecimal."""
    digest = hashlib.sha256()
    for name in model.coding_table_names():
        digest.update(getattr(model, name).cpu().numpy().tobytes())
    return digest.hexdigest()
