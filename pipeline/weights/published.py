"""What a published stage says of itself: in its checkpoint (`Lineage`) and beside it (`PublicationRecord`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common.contracts import contract_of, read_contract, to_values
from pipeline.common.files import write_json
from pipeline.weights.metadata import CheckpointError, read_metadata

if TYPE_CHECKING:
    from modules import HPCM


@dataclass(frozen=True)
class Quality:
    """Rate in bits per pixel, PSNR in dB, MS-SSIM in 0 … 1 (None for small images), and the loss they make."""

    bpp: float
    psnr_db: float
    ms_ssim: float | None
    rd_loss: float
    others: dict[str, float] = field(default_factory=dict)
    """Registered metrics beside these, by name."""

    def metrics(self, prefix: str) -> dict[str, float]:
        """The values by metric name, those that are known."""
        values = {"bpp": self.bpp, "psnr_db": self.psnr_db, "ms_ssim": self.ms_ssim, "rd_loss": self.rd_loss}
        every = {**values, **self.others}
        return {f"{prefix}/{name}": value for name, value in every.items() if value is not None}


@dataclass(frozen=True)
class Validation:
    """What the quality of a published stage depends on beside its codec: the images, λ and the metric."""

    digest: str
    images: tuple[str, ...]
    lmbda: float
    metric: str


@dataclass(frozen=True)
class Lineage:
    """What a published codec's checkpoint says of where it comes from; a field that does not apply is None or empty."""

    name: str | None = None
    """The stage's."""
    stage: str | None = None
    """The resolved stage, in YAML."""
    code: str | None = None
    """Version of the code that trained it."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of all that the stage was made from, by name; `parent` is the digest of the parent's weights."""
    quality: Quality | None = None
    """In real bitstreams on whole validation images."""
    validation: Validation | None = None
    imported_from: str | None = None
    """Name of the official file that the weights were taken from."""
    identity: str | None = None
    """The name, hexadecimal, by which the files that the codec codes know it."""
    exported_from: str | None = None
    """Digest of the weights that these were rounded from."""

    @classmethod
    def read(cls, path: Path) -> Lineage:
        """The lineage in a checkpoint's metadata; raises CheckpointError, naming the file."""
        return contract_of(cls, read_metadata(path), path, CheckpointError)


def publish(path: Path, model: HPCM, lineage: Lineage) -> None:
    """Write a codec's checkpoint, loadable by `load_codec` with nothing else at hand; raises FileError."""
    from modules.bitstream import model_identity
    from pipeline.weights.checkpoints import codec_tensors, write

    known = {"config": model.config.to_dict(), "identity": model_identity(model).hex()}
    write(path, codec_tensors(model), {**to_values(lineage), **known})


@dataclass(frozen=True)
class StartFacts:
    """What was measured before the first step of a stage that has a parent: estimates on the validation images."""

    parent: Quality | None = None
    step0: Quality | None = None
    """The child's."""
    step0_gap: float | None = None
    """R-D loss of the child less its parent's."""


@dataclass(frozen=True)
class PublicationRecord:
    """`record.json`, which lies beside a published checkpoint: with it the stage counts as done."""

    digest: str
    """Of the weights."""
    inputs: dict[str, str]
    mlflow_key: str | None
    """What the stage's MLflow run is found by."""
    parameters: int
    kmacs_per_pixel: float
    quality: Quality
    training_seconds: float
    steps: int
    skipped_steps: int
    facts: StartFacts

    @classmethod
    def read(cls, path: Path) -> PublicationRecord:
        """The record in a file; raises FileError, naming it, where it is missing or damaged."""
        return read_contract(cls, path)

    def write(self, path: Path) -> None:
        """Write the file whole; raises FileError."""
        write_json(path, asdict(self))
