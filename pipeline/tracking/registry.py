"""A published stage in MLflow: a LoggedModel with metrics and data set, and a version of a registered model.

Every step first checks what the store has, so that a repetition changes nothing.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.common.fault_injection import fault
from pipeline.common.tables import shortest
from pipeline.records.chains import StoredStage
from pipeline.records.record import CHECKPOINT, StageRecord
from pipeline.tracking.mlflow_model import save_mlflow_model
from pipeline.tracking.store import Store, experiment_id

DIGEST, VALIDATION, LOSS, STAGE = "hpcm.checkpoint_digest", "hpcm.validation", "hpcm.rd_loss", "hpcm.stage"
BEST = "best"
DESCRIPTION = (
    "HPCM codecs of one recipe, λ and seed. Each version is a published stage, and its alias is the stage's name. "
    "The alias `best` is the version with the lowest R-D loss on the validation images of the newest version."
)


def registered_name(record: StageRecord) -> str:
    """Name of the registered model of a stage's chain."""
    return f"hpcm-{record.recipe}-lmbda-{shortest(record.lmbda)}" + (f"-seed-{record.seed}" if record.seed else "")


def register(store: Store, client: MlflowClient, run_id: str, stage: StoredStage) -> None:
    """Make the stage's LoggedModel and version if the store lacks them, and set the aliases."""
    model = _logged_model(store, client, run_id, stage)
    _log_metrics(client, run_id, stage.record, model)
    outputs = client.get_run(run_id).outputs
    if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, stage.record.trained.steps)])
    fault("model.logged")
    _version(client, run_id, stage.record, model)
    fault("model.versioned")
    _set_aliases(client, stage.record)


def _logged_model(store: Store, client: MlflowClient, run_id: str, stage: StoredStage) -> LoggedModel:
    wanted = f"source_run_id = '{run_id}' AND tags.`{DIGEST}` = '{stage.record.digest}'"
    experiment = experiment_id(client)
    found = client.search_logged_models([experiment], wanted, max_results=1)
    model = next(iter(found), None) or client.create_logged_model(
        experiment, stage.record.name, run_id, _tags(stage.record), model_type="image codec"
    )
    fault("model.created")
    if str(model.status) != "READY":
        with TemporaryDirectory(prefix="hpcm-") as folder:
            files = Path(folder, "model")
            save_mlflow_model(stage.folder / CHECKPOINT, files)
            store.model_artifacts(model).log_artifacts(str(files))
        fault("model.uploaded")
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _log_metrics(client: MlflowClient, run_id: str, record: StageRecord, model: LoggedModel) -> None:
    """Log the run's final values to the model, with their time and step, so that the run does not get them again."""
    known = {metric.key for metric in model.metrics or ()}
    fresh = []
    for key in sorted(client.get_run(run_id).data.metrics.keys() - known):
        if key.startswith("final/"):
            latest = max(client.get_metric_history(run_id, key), key=lambda metric: metric.step)
            place = (latest.value, latest.timestamp, latest.step)
            data = (record.val_images.name, _validation(record))
            fresh.append(Metric(key, *place, model.model_id, *data, run_id))
    if fresh:
        client.log_batch(run_id, metrics=fresh, synchronous=True)


def _version(client: MlflowClient, run_id: str, record: StageRecord, model: LoggedModel) -> None:
    name = registered_name(record)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=DESCRIPTION)
    if any(
        version.run_id == run_id and version.tags.get(DIGEST) == record.digest for version in _versions(client, name)
    ):
        return
    # Not `models:/…`, because MLflow looks up such an address in the default store of its process.
    client.create_model_version(
        name, model.artifact_location, run_id, _tags(record), await_creation_for=0, model_id=model.model_id,
        description=f"{_loss(record):.4f} R-D loss on {record.val_images.name} ({record.name})",
    )  # fmt: skip


def _set_aliases(client: MlflowClient, record: StageRecord) -> None:
    """Set the stage's alias to its newest version, and `best` to the lowest loss on that version's images."""
    name = registered_name(record)
    versions = sorted(_versions(client, name), key=lambda version: int(version.version))
    wanted = {version.tags.get(STAGE, ""): version for version in versions}
    comparable = [version for version in versions if version.tags.get(VALIDATION) == versions[-1].tags.get(VALIDATION)]
    wanted[BEST] = min(comparable, key=lambda version: float(version.tags.get(LOSS, "inf")))
    aliases = dict(client.get_registered_model(name).aliases)
    for alias in (record.name, BEST):
        number = str(wanted[alias].version)
        # MLflow reserves `latest` and v1, v2, ….
        allowed = re.fullmatch(r"[\w-]+", alias, re.ASCII) and not re.fullmatch(r"(?i)latest|v\d+", alias)
        if allowed and str(aliases.get(alias)) != number:
            client.set_registered_model_alias(name, alias, number)


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    return list(client.search_model_versions(f"name = '{name}'"))


def _tags(record: StageRecord) -> dict[str, str]:
    lineage = {f"hpcm.input.{name.replace(' ', '_')}": digest for name, digest in record.lineage.inputs.items()}
    return {
        **lineage, "hpcm.recipe": record.recipe, "hpcm.lmbda": repr(record.lmbda), "hpcm.seed": str(record.seed),
        STAGE: record.name, DIGEST: str(record.digest), LOSS: repr(_loss(record)), VALIDATION: _validation(record),
    }  # fmt: skip


def _loss(record: StageRecord) -> float:
    assert record.quality is not None  # a published stage was evaluated
    return record.quality.rd_loss


def _validation(record: StageRecord) -> str:
    """Digest of the validation images. Losses with equal digests can be compared."""
    return record.lineage.validation.digest[:36] if record.lineage.validation else ""
