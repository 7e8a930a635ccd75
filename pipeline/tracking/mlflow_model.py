"""A codec as a model of MLflow. `mlflow.pytorch.load_model` reads its pickle, `load_registered` its checkpoint."""

import atexit
import logging
import shutil
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow.pytorch
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.utils.models import get_model_name_and_version

from modules import HPCM
from pipeline.records.record import CHECKPOINT
from pipeline.tracking.store import Store, brief
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.metadata import CheckpointError


def save_mlflow_model(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's codec as a model of MLflow's PyTorch flavor, with the checkpoint in it.

    MLflow's flavor is a pickle of the codec; loading it needs this package, which is not on an index.
    """
    needed = [f"{name}=={metadata.version(name)}" for name in ("torch", "compressai", "einops", "safetensors")]
    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # MLflow warns of pickles each time.
    try:
        mlflow.pytorch.save_model(
            load_codec(checkpoint), folder, pip_requirements=needed, serialization_format="pickle"
        )
    finally:
        logger.setLevel(level)
    shutil.copyfile(checkpoint, folder / CHECKPOINT)


def load_registered(address: str) -> HPCM:
    """Load a codec from MLflow's registry, such as `models:/hpcm-tiny-lmbda-0.013@phase4`, as `load_codec` does."""
    return load_codec(registered_file(address))


def registered_file(address: str) -> Path:
    """The checkpoint of a codec in MLflow's registry, downloaded for as long as this process runs.

    The store is the one set by `mlflow.set_tracking_uri` or MLFLOW_TRACKING_URI, or else the one in the folder `runs`.
    Raises CheckpointError if it has no such model.
    """
    store = Store.at(mlflow.get_tracking_uri()) if mlflow.is_tracking_uri_set() else Store.default(Path("runs"))
    try:
        if store.database is not None and not store.database.exists():
            raise FileNotFoundError(f"{store.database}: no such file")
        # Use a client of this store, because MLflow's own loading of `models:/…` uses the process's default store.
        client = store.bare_client() if store.database is None else store.client()
        name, *version = get_model_name_and_version(client, address)
        if version:
            place = client.get_model_version_download_uri(name, version[0])
        else:
            place = client.get_logged_model(name).artifact_location
        folder = TemporaryDirectory(prefix="hpcm-")
        atexit.register(folder.cleanup)
        return Path(get_artifact_repository(place, tracking_uri=store.uri).download_artifacts(CHECKPOINT, folder.name))
    except Exception as error:  # MLflow passes on the errors of its backends.
        raise CheckpointError(
            f"{address}: MLflow has no such codec: {brief(error)}.\n"
            "  MLFLOW_TRACKING_URI names the store; `hpcm ui` shows the models in a folder of runs."
        ) from None  # The error may show a password.
