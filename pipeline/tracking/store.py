"""MLflow's store: a database and a folder of artifacts in the folder of runs, or a server.

Runs are found by a tag, not by an id in a file: after a kill at any moment, the same chain and stage find the same run.
Artifacts in a folder of runs are found by the run's id, not by the address in the database: the folder may have been
moved or copied, and the database may be a stranger's.
"""

import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.engine import make_url

from pipeline.common.errors import UserError
from pipeline.common.files import replacing
from pipeline.common.folder_lock import alone_at

EXPERIMENT = "hpcm"
DATABASE = "mlflow.db"
KEY = "hpcm.key"
"""Tag by which a run is found."""
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of MLflow's database with addresses of artifacts."""
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow prints two addresses for each run that ends, between the lines of a chain's progress.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The mirror is repeated as a whole, after it has seen what the store has.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


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
        runs, uri = runs.absolute(), os.environ.get("MLFLOW_TRACKING_URI")
        return cls.at(uri) if uri else cls(_sqlite_address(runs / DATABASE), runs)

    @classmethod
    def at(cls, uri: str) -> "Store":
        """The store at an address. Raises StoreError if it is unclear where a password in it ends."""
        if re.match(r"(?!sqlite:|file:)[\w+]+://([^/?#@]*@[^/?#@]*@|[^/?#\s]*[/?#\s].*@)", uri):
            raise StoreError("MLFLOW_TRACKING_URI: in a password write @ / ? # and a space as %40 %2F %3F %23 and %20")
        return cls(uri)

    @property
    def database(self) -> Path | None:
        """The database file; None for a store at MLFLOW_TRACKING_URI."""
        return self.runs / DATABASE if self.runs else None

    @property
    def shown(self) -> str:
        """The address without passwords."""
        return str(self.database) if self.database else without_password(self.uri)

    @contextmanager
    def errors_as_its_own(self) -> Iterator[None]:
        """Raise StoreError, without passwords, for whatever MLflow raises in the context."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # MLflow passes on the errors of its backends.
            raise StoreError(f"MLflow ({self.shown}): {brief(error)}") from None

    def bare_client(self) -> MlflowClient:
        """A client that creates nothing. It does not try again for minutes if a server is away."""
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=self.uri)

    def client(self) -> MlflowClient:
        """A client. Creates the store and the experiment if they are missing.

        Raises StoreError if the experiment is in MLflow's trash, or if no MLflow server answers at the address.
        """
        with self.errors_as_its_own():
            if self.database is not None:
                if self.database.is_symlink():
                    raise StoreError(
                        f"{self.database}: this is a link, and links are not followed; give the database itself in "
                        "MLFLOW_TRACKING_URI"
                    )
                make_database(self.database)
            client = self.bare_client()
            if client.get_experiment_by_name(EXPERIMENT) is None:
                try:
                    client.create_experiment(EXPERIMENT, self._artifacts.as_uri() if self.runs else None)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":  # Another process was faster.
                        raise
            found = experiment(client)
            if self.database is not None:
                self._point_artifacts_here(found.artifact_location.rstrip("/"), self.database)
        return client

    def artifacts(self, client: MlflowClient, run_id: str) -> ArtifactRepository:
        """The repository of a run's artifacts. Raises StoreError if a link lies in its folder."""
        return self._repository(run_id, "" if self.runs else client.get_run(run_id).info.artifact_uri)

    def model_artifacts(self, model: LoggedModel) -> ArtifactRepository:
        """The repository of a LoggedModel's files. Raises StoreError if a link lies in its folder."""
        return self._repository(f"models/{model.model_id}", model.artifact_location)

    def _repository(self, name: str, address: str) -> ArtifactRepository:
        """The artifacts of a run or model: in the folder of runs, whatever its database says, or at the address."""
        if self.runs:
            if not re.fullmatch("[0-9a-f]{32}|models/m-[0-9a-f]{32}", name):
                raise StoreError(f"{self.shown}: {name!r} is not an id of MLflow")
            folder = self._artifacts / name / "artifacts"
            for place in (self._artifacts, folder.parent, folder, *folder.rglob("*")):
                if place.is_symlink():
                    raise StoreError(f"{place}: this is a link, and links are not followed; remove it")
            address = folder.as_uri()
        return get_artifact_repository(address, tracking_uri=self.uri)

    @property
    def _artifacts(self) -> Path:
        assert self.runs is not None
        return self.runs / "mlartifacts"

    def _point_artifacts_here(self, there: str, database: Path) -> None:
        """Update the addresses of artifacts in a moved or copied database, for MLflow's own web pages."""
        here = self._artifacts.as_uri()
        if there == here:
            return
        if not re.match(r"file:.*/mlartifacts$", there):
            raise StoreError(
                f"{self.shown}: its artifacts are kept outside the folder of runs, in {there}. "
                f"If that is meant, give the database itself: MLFLOW_TRACKING_URI={self.uri}"
            )
        # MLflow has no call for this. A read-only database stays as it is.
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database)) as connection, connection:
            for table, column in _ADDRESSES:
                connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (there, here))


def make_database(path: Path) -> None:
    """Make an empty MLflow database if there is none. Raises FileError."""
    if path.exists():
        return
    # Two processes may start in an empty folder at the same time.
    with alone_at(path.with_name("mlflow.lock")):
        if not path.exists():
            # Elsewhere first: a database that a kill left half made cannot be repaired, and MLflow also makes the
            # folder that an escaped address seems to name.
            with TemporaryDirectory(prefix="hpcm-") as folder:
                _create_tables(Path(folder, path.name))
                with replacing(path) as partial:
                    shutil.copyfile(Path(folder, path.name), partial)


def _create_tables(path: Path) -> None:
    Store(_sqlite_address(path)).bare_client().search_experiments()


def _sqlite_address(path: Path) -> str:
    """A database's address with `?`, `#` and `%` escaped. Raises StoreError if SQLAlchemy does not decode them."""
    if not set("?#%") & set(str(path)):
        return f"sqlite:///{path}"
    address = f"sqlite:///{quote(str(path), safe='/ +')}"
    if make_url(address).database != str(path):
        raise StoreError(f"{path.parent}: rename it: this version of SQLAlchemy cannot open paths with ?, # or %")
    return address


def experiment(client: MlflowClient) -> Experiment:
    """The experiment of all runs. Raises StoreError if it accepts no entries."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None or not found.experiment_id:
        raise StoreError(f"MLflow ({without_password(str(client.tracking_uri))}): this is not an MLflow server")
    if found.lifecycle_stage == "deleted":
        raise StoreError(
            f"the experiment {EXPERIMENT} is in MLflow's trash: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
        )
    return found


def experiment_id(client: MlflowClient) -> str:
    """Id of the experiment of all runs. Raises StoreError if it accepts no entries."""
    return str(experiment(client).experiment_id)


def find_run(client: MlflowClient, key: str) -> str | None:
    """Id of the run with this key, or None. Of several, which only two mirrors at once can make, it is the oldest."""
    if not re.fullmatch(r"[\w -]+", key):
        raise StoreError(f"{key!r} in record.json or chain.json is not a key of this program")
    oldest = ["attributes.start_time ASC", "attributes.run_id ASC"]
    found = client.search_runs([experiment_id(client)], f"tags.`{KEY}` = '{key}'", max_results=1, order_by=oldest)
    return found[0].info.run_id if found else None


def without_password(text: str) -> str:
    """A text with user names, passwords and query strings removed from its addresses."""
    text = re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", text)
    return re.sub(r"\b((?!sqlite|file)[\w+]+:/+)\S*@", r"\1***@", text)


def brief(error: Exception) -> str:
    """An error of MLflow's libraries on one line, without passwords."""
    return shorten(without_password(f"{type(error).__name__}: {error}"), 240, placeholder=" …")
