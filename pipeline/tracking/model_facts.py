"""The facts about a published stage in MLflow's registry of models."""

from dataclasses import dataclass, field

from pipeline.common.contracts import Long


@dataclass(frozen=True)
class ModelFacts:
    """A published stage as a model of MLflow's registry."""

    registered: str
    """Name of the registered model: preset and λ."""
    stage: str
    digest: str
    """Digest of the weights. A run has one version per digest."""
    metrics: dict[str, float]
    """Final metrics of the stage's run, by name."""
    step: Long
    """Training steps of the stage."""
    loss: float
    """R-D loss on the validation images. The version with the lowest loss is `best`."""
    dataset: str
    """Name of the validation images."""
    dataset_digest: str
    """Digest of the validation images and settings. Losses with equal digests can be compared."""
    lineage: dict[str, str] = field(default_factory=dict)
    """Further tags: recipe, seed, parent and code, by name."""
