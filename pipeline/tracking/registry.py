"""A published stage in MLflow: a LoggedModel with metrics and data set, and a version of a registered model.

Every step first checks what the store has, so that a repetition changes nothing.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.common.tables import shortest
from pipeline.records.chains import StoredStage
from pipeline.records.record import CHECKPOINT, StageRecord
from pipeline.tracking.mlflow_model import save_mlflow_model
from pipeline.tracking.store import Store, experiment_id

DIGEST, LOSS, CONDITIONS = "hpcm.checkpoint_digest", "hpcm.rd_loss", "hpcm.validation"
"""Tags of a version. Losses that were measured under equal conditions can be compared."""
DIGITS = 36
"""Digits of a data set's digest; MLflow refuses longer ones."""
DESCRIPTION = (
    "HPCM codecs of one recipe, λ and seed. Each version is a published stage, and its alias is the stage's name. "
    "The alias `best` is the version with the lowest R-D loss among those that were validated as the newest one was."
)


def registered_name(record: StageRecord) -> str:
    """Name of the registered model of a stage's chain: its recipe, λ, and a seed other than 0."""
    return f"hpcm-{record.recipe}-lmbda-{shortest(record.lmbda)}" + (f"-seed-{record.seed}" if record.seed else "")


def register(store: Store, client: MlflowClient, run_id: str, stage: StoredStage, final: Sequence[Metric]) -> None:
    """Make the stage's LoggedModel and version if the store lacks them, and set the aliases.

    `final` has the final metrics of its run, which the model shows too.
    """
    model = _logged_model(store, client, run_id, stage)
    known, images = {metric.key for metric in model.metrics or ()}, stage.record.val_images
    data = model.model_id, images.name, images.digest[:DIGITS], run_id
    # With the run's time and step, so that the run does not get them again.
    fresh = [Metric(m.key, m.value, m.timestamp, m.step, *data) for m in final if m.key not in known]
    if fresh:
        client.log_batch(run_id, metrics=fresh, synchronous=True)
    outputs = client.get_run(run_id).outputs
    if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, stage.record.trained.steps)])
    version = _version(client, run_id, stage.record, model)
    if stage.place == "published":
        _set_aliases(client, stage.record, version)


def _logged_model(store: Store, client: MlflowClient, run_id: str, stage: StoredStage) -> LoggedModel:
    wanted = f"source_run_id = '{run_id}' AND tags.`{DIGEST}` = '{stage.record.digest}'"
    experiment = experiment_id(client)
    found = client.search_logged_models([experiment], wanted, max_results=1)
    model = next(iter(found), None) or client.create_logged_model(
        experiment, stage.record.name, run_id, _tags(stage.record), model_type="image codec"
    )
    if str(model.status) != "READY":
        with TemporaryDirectory(prefix="hpcm-") as folder:
            files = Path(folder, "model")
            save_mlflow_model(stage.folder / CHECKPOINT, files)
            store.model_artifacts(model).log_artifacts(str(files))
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _version(client: MlflowClient, run_id: str, record: StageRecord, model: LoggedModel) -> ModelVersion:
    name = registered_name(record)
    try:
        client.create_registered_model(name, description=DESCRIPTION)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.run_id == run_id and version.tags.get(DIGEST) == record.digest:
            return version
    # Not `models:/…`, because MLflow looks up such an address in the default store of its process.
    return client.create_model_version(
        name, model.artifact_location, run_id, _tags(record), await_creation_for=0, model_id=model.model_id,
        description=f"{record.evaluated.quality.rd_loss:.4f} R-D loss on {record.val_images.name} ({record.name})",
    )  # fmt: skip


def _set_aliases(client: MlflowClient, record: StageRecord, version: ModelVersion) -> None:
    """Set the stage's alias to its version, and `best` to the lowest loss under the newest version's conditions."""
    name = registered_name(record)
    versions = list(client.search_model_versions(f"name = '{name}'"))
    newest = max(versions, key=lambda version: int(version.version))
    comparable = [other for other in versions if other.tags.get(CONDITIONS) == newest.tags.get(CONDITIONS)]
    best = min(comparable, key=lambda version: float(version.tags.get(LOSS, "inf")))
    aliases = dict(client.get_registered_model(name).aliases)
    for alias, wanted in ((record.name, version), ("best", best)):
        # MLflow reserves `latest` and v1, v2, ….
        allowed = re.fullmatch(r"[\w-]+", alias, re.ASCII) and not re.fullmatch(r"(?i)latest|v\d+", alias)
        if allowed and str(aliases.get(alias)) != str(wanted.version):
            client.set_registered_model_alias(name, alias, str(wanted.version))


def _tags(record: StageRecord) -> dict[str, str]:
    lineage = {f"hpcm.input.{name.replace(' ', '_')}": digest for name, digest in record.lineage.inputs.items()}
    known = record.lineage.validation
    return {
        **lineage, "hpcm.recipe": record.recipe, "hpcm.lmbda": repr(record.lmbda), "hpcm.seed": str(record.seed),
        "hpcm.stage": record.name, DIGEST: str(record.digest), LOSS: repr(record.evaluated.quality.rd_loss),
        CONDITIONS: f"{known.metric} on {len(known.images)} images of {known.digest[:DIGITS]}" if known else "",
    }  # fmt: skip
