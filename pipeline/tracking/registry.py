"""A published stage in MLflow: a LoggedModel with metrics and data set, and a version of a registered model.

Every step first checks what the store has, so that a second delivery of the same entry changes nothing.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

from pipeline.common.fault_injection import fault
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.store import EntryError, Store, StoreError, experiment_id

DIGEST, VALIDATION, LOSS = "hpcm.checkpoint_digest", "hpcm.validation", "hpcm.rd_loss"
BEST = "best"
DESCRIPTION = (
    "HPCM codecs of one preset and λ. Each version is a published stage, and its alias is the stage's name. "
    "The alias `best` is the version with the lowest R-D loss on the validation images of the newest version."
)


class Registry:
    """The LoggedModels and the registered models of a store."""

    def __init__(self, store: Store, client: "MlflowClient"):
        self.store, self.client = store, client

    def register(self, run_id: str, facts: ModelFacts, files: Path | None) -> None:
        """Make the stage's LoggedModel and version if the store lacks them, and set the aliases.

        `files` is the model's folder. It may be None if the store has the model already. Raises EntryError if neither
        has it, and StoreError if the store does not show the result.
        """
        model = self._logged_model(run_id, facts, files)
        self._log_metrics(run_id, facts, model)
        outputs = self.client.get_run(run_id).outputs
        if outputs is None or model.model_id not in {output.model_id for output in outputs.model_outputs}:
            from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, facts.step)])
        fault("model.logged")
        version = self._version(run_id, facts, model)
        fault("model.versioned")
        self._set_aliases(facts)
        found = self.client.get_model_version(facts.registered, version.version)
        if found.tags.get(DIGEST) != facts.digest:
            raise StoreError(f"MLflow accepted version {version.version} of {facts.registered} but does not show it")

    def _logged_model(self, run_id: str, facts: ModelFacts, files: Path | None) -> "LoggedModel":
        wanted = f"source_run_id = '{run_id}' AND tags.`{DIGEST}` = '{facts.digest}'"
        found = self.client.search_logged_models([experiment_id(self.client)], wanted, max_results=1)
        model = next(iter(found), None) or self.client.create_logged_model(
            experiment_id(self.client), facts.stage, run_id, self._tags(facts), model_type="image codec"
        )
        fault("model.created")
        if str(model.status) != "READY":
            if files is None:
                raise EntryError(f"the files of the model {facts.stage} are missing, here and in MLflow")
            self.store.model_artifacts(model).log_artifacts(str(files))
            fault("model.uploaded")
            model = self.client.finalize_logged_model(model.model_id, "READY")
        return model

    def _log_metrics(self, run_id: str, facts: ModelFacts, model: "LoggedModel") -> None:
        """Log the run's values to the model, with their time and step, so that the run does not get them again."""
        from mlflow.entities import Metric

        known = {metric.key for metric in model.metrics or ()}
        fresh = []
        for key in facts.metrics.keys() - known:
            latest = max(self.client.get_metric_history(run_id, key), key=lambda m: m.step, default=None)
            if latest is not None:
                place = (latest.value, latest.timestamp, latest.step)
                data = (facts.dataset, facts.dataset_digest)
                fresh.append(Metric(key, *place, model.model_id, *data, run_id))
        if fresh:
            self.client.log_batch(run_id, metrics=fresh, synchronous=True)

    def _version(self, run_id: str, facts: ModelFacts, model: "LoggedModel") -> "ModelVersion":
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(facts.registered)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.client.create_registered_model(facts.registered, description=DESCRIPTION)
        for version in self._versions(facts.registered):
            if version.run_id == run_id and version.tags.get(DIGEST) == facts.digest:
                return version
        description = f"{facts.loss:.4f} R-D loss on {facts.dataset} ({facts.stage})"
        # Not `models:/…`, because MLflow looks up such an address in the default store of its process.
        return self.client.create_model_version(
            facts.registered, model.artifact_location, run_id, self._tags(facts), description=description,
            await_creation_for=0, model_id=model.model_id,
        )  # fmt: skip

    def _set_aliases(self, facts: ModelFacts) -> None:
        """Set the stage's alias to its newest version, and `best` to the lowest loss on that version's images."""
        versions = sorted(self._versions(facts.registered), key=lambda version: int(version.version))
        wanted = {version.tags.get("hpcm.stage", ""): version for version in versions}
        comparable = [
            version for version in versions if version.tags.get(VALIDATION) == versions[-1].tags.get(VALIDATION)
        ]
        wanted[BEST] = min(comparable, key=lambda version: float(version.tags.get(LOSS, "inf")))
        aliases = dict(self.client.get_registered_model(facts.registered).aliases)
        for alias in (facts.stage, BEST):
            number = str(wanted[alias].version)
            # MLflow reserves `latest` and v1, v2, ….
            allowed = re.fullmatch(r"[\w-]+", alias, re.ASCII) and not re.fullmatch(r"(?i)latest|v\d+", alias)
            if allowed and str(aliases.get(alias)) != number:
                self.client.set_registered_model_alias(facts.registered, alias, number)

    def _versions(self, name: str) -> "list[ModelVersion]":
        return list(self.client.search_model_versions(f"name = '{name}'"))

    @staticmethod
    def _tags(facts: ModelFacts) -> dict[str, str]:
        return {
            **facts.lineage, "hpcm.stage": facts.stage, DIGEST: facts.digest, LOSS: repr(facts.loss),
            VALIDATION: facts.dataset_digest,
        }  # fmt: skip
