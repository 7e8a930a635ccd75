"""MLflow's store: a database and a folder of artifacts in the folder of runs, or a server.

Runs are found by a tag, not by an id in a file: after a kill at any moment, the same chain and stage find the same run.
Artifacts in a folder of runs are found by the run's id, not by the address in the database: the folder may have been
moved or copied.
"""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.engine import make_url

from pipeline.common.errors import UserError
from pipeline.common.files import FileError
from pipeline.common.folder_lock import alone_at

EXPERIMENT = "hpcm"
DATABASE = "mlflow.db"
_MODEL_ADDRESSES = (
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
KEY = "hpcm.key"
"""Tag by which a run is found."""


class StoreError(UserError):
    """The store is not an MLflow store, or does not accept entries."""


@dataclass(frozen=True)
class Store:
    """An MLflow store: in the folder `runs`, or at the address in MLFLOW_TRACKING_URI."""

    uri: str
    runs: Path | None = None

    @classmethod
    def default(cls, runs: Path) -> "Store":
        """The store at MLFLOW_TRACKING_URI if that is set, else in the folder of runs."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        runs = runs.absolute()
        return cls(uri) if uri else cls(_sqlite_address(runs / DATABASE), runs)

    @property
    def database(self) -> Path | None:
        """The database file; None for a store at MLFLOW_TRACKING_URI."""
        return self.runs / DATABASE if self.runs else None

    @property
    def shown(self) -> str:
        """The address without passwords."""
        return str(self.database) if self.database else without_password(self.uri)

    def client(self) -> MlflowClient:
        """A client. Creates the store and the experiment if they are missing.

        Raises StoreError if the experiment is in MLflow's trash or if the address is not an MLflow server's.
        """
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # It prints two addresses for each run that ends, between the lines of a chain's progress.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        # The mirror is repeated as a whole, after it has seen what the store has.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.runs is None:
            client = MlflowClient(tracking_uri=self.uri)
            _create_experiment(client, None)
        else:
            # Two processes may start in an empty folder at the same time.
            with self._alone():
                make_database(self.runs / DATABASE)
                client = MlflowClient(tracking_uri=self.uri)
                _create_experiment(client, self._artifact_folder.as_uri())
                self._point_artifacts_here(client)
        experiment_id(client)
        return client

    def artifacts(self, client: MlflowClient, run_id: str) -> ArtifactRepository:
        """The repository of a run's artifacts. Raises StoreError if a link lies in its folder."""
        if self.runs is None:
            return self._artifacts_at(client.get_run(run_id).info.artifact_uri)
        return self._artifacts_at(self._own_artifacts(run_id))

    def model_artifacts(self, model: LoggedModel) -> ArtifactRepository:
        """The repository of a LoggedModel's files. Raises StoreError if a link lies in its folder."""
        if self.runs is None:
            return self._artifacts_at(model.artifact_location)
        return self._artifacts_at(self._own_artifacts(f"models/{model.model_id}"))

    def _artifacts_at(self, address: str) -> ArtifactRepository:
        return get_artifact_repository(address, tracking_uri=self.uri)

    def _own_artifacts(self, name: str) -> str:
        """The address of the artifacts of a run or model in the folder of runs, whatever its database says."""
        if not re.fullmatch("[0-9a-f]{32}|models/m-[0-9a-f]{32}", name):
            raise StoreError(f"{self.shown}: {name!r} is not an id of MLflow")
        folder = self._artifact_folder / name / "artifacts"
        for place in (folder.parent, folder, *folder.rglob("*")):
            if place.is_symlink():
                raise StoreError(f"{place}: this is a link, and links are not followed; remove it")
        return folder.as_uri()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert self.runs is not None
        with ExitStack() as exits:
            try:
                exits.enter_context(alone_at(self.runs / "mlflow.lock"))
            except (FileError, OSError):
                if not (self.runs / DATABASE).exists():
                    raise
                # The folder may be read-only; its database exists.
            yield

    @property
    def _artifact_folder(self) -> Path:
        assert self.runs is not None
        return self.runs / "mlartifacts"

    def _point_artifacts_here(self, client: MlflowClient) -> None:
        """Update the addresses of artifacts in a moved or copied database, for MLflow's own web pages."""
        experiment = client.get_experiment_by_name(EXPERIMENT)
        here = self._artifact_folder.as_uri()
        if experiment is None or experiment.artifact_location == here:
            return
        if not _is_in_a_folder_of_runs(experiment.artifact_location):
            raise StoreError(
                f"{self.shown}: its artifacts are kept outside the folder of runs, in {experiment.artifact_location}. "
                f"If that is meant, give the database itself: MLFLOW_TRACKING_URI={self.uri}"
            )
        there = experiment.artifact_location.rstrip("/")
        # MLflow has no call for this. A read-only database stays as it is.
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self.runs / DATABASE)) as connection:  # type: ignore[operator]
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                (here, experiment.experiment_id),
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (here, len(there) + 1, experiment.experiment_id, len(there) + 1, f"{there}/"),
            )
            for table, column in _MODEL_ADDRESSES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )
            connection.commit()


def make_database(path: Path) -> None:
    """Make an empty MLflow database if there is none. The caller must hold the lock."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first: a database that a kill left half made cannot be repaired.
    partial = path.with_name("mlflow.db.partial")
    partial.unlink(missing_ok=True)
    address = _sqlite_address(partial)
    MlflowClient(tracking_uri=address).search_experiments()
    partial.replace(path)
    # MLflow also makes a folder named as the escaped address.
    mistaken = Path(address.removeprefix("sqlite:///")).parent
    if mistaken != path.parent:
        with suppress(OSError):
            mistaken.rmdir()


def _sqlite_address(path: Path) -> str:
    """A database's address with `?`, `#` and `%` escaped. Raises StoreError if SQLAlchemy does not decode them."""
    if not set("?#%") & set(str(path)):
        return f"sqlite:///{path}"
    address = f"sqlite:///{quote(str(path), safe='/ +')}"
    if make_url(address).database != str(path):
        raise StoreError(f"{path.parent}: rename it: this version of SQLAlchemy cannot open paths with ?, # or %")
    return address


def _is_in_a_folder_of_runs(address: str) -> bool:
    return address.startswith("file:") and "/mlartifacts" in address


def _create_experiment(client: MlflowClient, artifacts: str | None) -> None:
    if client.get_experiment_by_name(EXPERIMENT) is None:
        try:
            client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def experiment_id(client: MlflowClient) -> str:
    """Id of the experiment. Raises StoreError if it accepts no entries."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise StoreError(
            f"the experiment {EXPERIMENT} is in MLflow's trash: restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        )
    if experiment is None or not experiment.experiment_id:
        raise StoreError("the server at this address is not an MLflow server")
    return str(experiment.experiment_id)


def find_run(client: MlflowClient, key: str) -> str | None:
    """Id of the run with this key, or None."""
    found = client.search_runs(
        [experiment_id(client)], f"tags.`{KEY}` = '{key}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    return found[0].info.run_id if found else None


def without_password(text: str) -> str:
    """A text with user names, passwords and query strings removed from its addresses."""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1***@", re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", text))


def brief(error: Exception) -> str:
    """An error of MLflow's libraries on one line, without passwords."""
    return shorten(without_password(f"{type(error).__name__}: {error}"), 160, placeholder=" …")
