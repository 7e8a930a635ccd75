"""What each stage changed, from MLflow's records, checked against the files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipeline import checkpoints
from pipeline.checkpoints import CheckpointError
from pipeline.tracking import EXPERIMENT, Store

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class StageAudit:
    """One stage run: its record, and whether the file it published is still the one that was recorded."""

    name: str
    state: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]
    files: str
    """`verified`, `not published`, or what is wrong."""

    @property
    def sound(self) -> bool:
        """Whether files and record agree."""
        return self.files in ("verified", "not published", "superseded")

    @property
    def attempts(self) -> list[str]:
        """How each attempt began, oldest first."""
        return [value for key, value in sorted(self.tags.items()) if key.startswith("hpcm.attempt.")]

    def phases(self) -> Iterator[str]:
        """Each phase with steps and learning rates."""
        names = sorted({key.split(".")[1] for key in self.parameters if key.startswith("schedule.")})
        for name in names:
            prefix = f"schedule.{name}."
            rates = [
                f"{key.removeprefix(prefix + 'lr.')} {value}"
                for key, value in self.parameters.items()
                if key.startswith(prefix + "lr.")
            ]
            yield f"{name} {self.parameters[prefix + 'steps']} steps ({', '.join(rates)})"


@dataclass(frozen=True)
class ChainAudit:
    """One chain of stages, in the order they were run."""

    name: str
    state: str
    stages: tuple[StageAudit, ...]


def audit(runs: Path) -> list[ChainAudit]:
    """Every chain in the store of this folder of runs, newest first."""
    client = Store.default(runs).client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None  # the client sees to it
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000)
    chains = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return [
        ChainAudit(
            run.info.run_name,
            run.info.status,
            tuple(
                _audit_stage(stage) for stage in found if stage.data.tags.get("mlflow.parentRunId") == run.info.run_id
            ),
        )
        for run in reversed(chains)
    ]


def _audit_stage(run: "Run") -> StageAudit:
    tags = dict(run.data.tags)
    return StageAudit(
        tags.get("hpcm.stage", run.info.run_name),
        run.info.status,
        dict(run.data.params),
        dict(run.data.metrics),
        tags,
        _check_files(tags),
    )


def _check_files(tags: dict[str, str]) -> str:
    digest = tags.get("hpcm.checkpoint_digest")
    if digest is None:
        return "not published"
    path = Path(tags["hpcm.checkpoint"])
    try:
        if checkpoints.read(path).metadata["digest"] == digest:
            return "verified"
    except CheckpointError as error:
        return str(error)
    # A stale stage's successor lies in its place; the old files were moved aside.
    kept = path.parent.parent / "superseded" / f"{path.parent.name}-{digest[:12]}" / path.name
    return "superseded" if kept.is_file() else f"{path}: not the checkpoint that was recorded ({digest[:12]}…)"


def audit_table(chain: ChainAudit) -> Table:
    """One line per stage."""
    table = Table(title=f"{chain.name} ({chain.state})", title_justify="left", show_lines=True)
    for column in (
        "stage",
        "tensors",
        "phases (learning rates)",
        "R-D loss: parent → step 0 → end",
        "bpp",
        "PSNR dB",
    ):
        table.add_column(column)
    for column in ("attempts", "acceptance", "checkpoint"):
        table.add_column(column)
    for stage in chain.stages:
        metrics = stage.metrics
        losses = [_number(metrics.get("val/parent/rd_loss")), _number(stage.tags.get("hpcm.step0_loss"))]
        table.add_row(
            f"{stage.name}\n{stage.state}",
            stage.tags.get("hpcm.ledger", "–").replace(", ", "\n"),
            "\n".join(stage.phases()),
            " → ".join([*losses, _number(metrics.get("final/rd_loss"))]),
            _number(metrics.get("final/bpp")),
            _number(metrics.get("final/psnr_db")),
            "\n".join(stage.attempts),
            stage.tags.get("hpcm.acceptance", "–"),
            stage.files,
        )
    return table


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.4f}"
