"""A codec as a model of MLflow, which `mlflow.pytorch.load_model` and `load_codec` read."""

from __future__ import annotations

import logging
import os
import shutil
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.weights.metadata import CheckpointError

if TYPE_CHECKING:
    from modules import HPCM

SCHEME = "models:/"
CHECKPOINT = "checkpoint.safetensors"


def save_mlflow_model(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's codec as a model of MLflow's PyTorch flavor, with the checkpoint in it.

    MLflow's flavor is a pickle of the codec; loading it needs this package. `load_codec` reads the checkpoint instead.
    """
    import mlflow.pytorch

    from pipeline.weights.checkpoints import load_codec

    logger = logging.getLogger("mlflow.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)  # MLflow warns of pickles each time.
    try:
        mlflow.pytorch.save_model(
            load_codec(checkpoint), folder, pip_requirements=_requirements(), serialization_format="pickle"
        )
    finally:
        logger.setLevel(level)
    shutil.copyfile(checkpoint, folder / CHECKPOINT)


def fetch(uri: str, into: Path) -> Path:
    """The checkpoint of a model in MLflow, such as `models:/hpcm-tiny-lmbda-0.013@phase4`.

    The store is the one set by `mlflow.set_tracking_uri` or MLFLOW_TRACKING_URI, or else the one in the folder `runs`.
    Raises CheckpointError if it has no such model.
    """
    import mlflow
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    local = Path("runs", "mlflow.db").absolute()
    chosen = mlflow.is_tracking_uri_set() or "MLFLOW_TRACKING_URI" in os.environ or not local.exists()
    store = mlflow.get_tracking_uri() if chosen else f"sqlite:///{local}"
    try:
        # Use a client of this store, because MLflow's own loading of `models:/…` uses the process's default store.
        client = MlflowClient(tracking_uri=store)
        name, *version = get_model_name_and_version(client, uri)
        if version:
            place = client.get_model_version_download_uri(name, version[0])
        else:
            place = client.get_logged_model(name).artifact_location
        path = get_artifact_repository(place, tracking_uri=store).download_artifacts(CHECKPOINT, str(into))
    except (MlflowException, OSError) as error:
        raise CheckpointError(
            f"{uri}: MLflow has no such codec: {str(error).splitlines()[0]}.\n"
            "  MLFLOW_TRACKING_URI names the store; `hpcm ui` shows the models in a folder of runs."
        ) from error
    return Path(path)


def load_from_mlflow(uri: str) -> HPCM:
    """Load a registered codec, as `load_codec` does."""
    from pipeline.weights.checkpoints import load_codec

    with TemporaryDirectory(prefix="hpcm-") as folder:
        return load_codec(fetch(uri, Path(folder)))


def _requirements() -> list[str]:
    """The installed versions of the packages that the pickled codec needs. This package is not on an index."""
    return [f"{name}=={metadata.version(name)}" for name in ("torch", "compressai", "einops", "safetensors")]
