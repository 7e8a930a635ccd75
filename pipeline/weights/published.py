"""The quality of a codec, and the lineage that its checkpoint carries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.contracts import contract_of
from pipeline.weights.metadata import CheckpointError, read_metadata


@dataclass(frozen=True)
class Quality:
    """Rate in bits per pixel, PSNR in dB, MS-SSIM in 0 … 1 (None for small images), and rate–distortion loss."""

    bpp: float
    psnr_db: float
    ms_ssim: float | None
    rd_loss: float
    others: dict[str, float] = field(default_factory=dict)
    """Values of other registered metrics, by name."""

    def text(self, rate: str = "bpp") -> str:
        """Rate, PSNR and, if known, MS-SSIM in words; `rate` is the unit of the rate."""
        similarity = f", MS-SSIM {self.ms_ssim:.4f}" if self.ms_ssim is not None else ""
        return f"{self.bpp:.4f} {rate}, {self.psnr_db:.2f} dB{similarity}"

    def metrics(self, prefix: str) -> dict[str, float]:
        """The values that are not None, by metric name."""
        values = {"bpp": self.bpp, "psnr_db": self.psnr_db, "ms_ssim": self.ms_ssim, "rd_loss": self.rd_loss}
        every = {**values, **self.others}
        return {f"{prefix}/{name}": value for name, value in every.items() if value is not None}


@dataclass(frozen=True)
class Validation:
    """The conditions under which a quality was measured: images, λ and metric."""

    digest: str
    images: tuple[str, ...]
    lmbda: float
    metric: str


@dataclass(frozen=True)
class Lineage:
    """The origin of a published codec, stored in its checkpoint. Fields that do not apply are None or empty."""

    name: str | None = None
    """Name of the stage."""
    stage: str | None = None
    """The stage as YAML, with all defaults."""
    lmbda: float | None = None
    """λ of the loss for which the codec was trained. Files of earlier versions have it in `stage` alone."""
    metric: str | None = None
    code: str | None = None
    """Version of the code that trained the codec."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the stage's inputs, by name; `parent` is the digest of the parent's weights."""
    quality: Quality | None = None
    """Measured with real bitstreams on whole validation images."""
    validation: Validation | None = None
    imported_from: str | None = None
    """Name of the official file with the original weights."""
    identity: str | None = None
    """Identity in hexadecimal; files coded with this codec store it."""
    exported_from: str | None = None
    """Digest of the weights before they were rounded."""
    filled_with_ones: str | None = None
    """Name of the vectors that the official file lacked, and that were set to ones."""

    @classmethod
    def read(cls, path: Path) -> "Lineage":
        """Read the lineage in a safetensors file's metadata; raises CheckpointError, naming the file."""
        return cls.of(read_metadata(path), path)

    @classmethod
    def of(cls, metadata: Mapping[str, Any], source: Path | str) -> "Lineage":
        """The lineage in a codec's metadata; raises CheckpointError, which names the source and the first odd field."""
        return contract_of(cls, metadata, source, CheckpointError)
