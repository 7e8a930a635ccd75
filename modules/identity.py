"""The name of a model in the files that it codes: what a decoder computes with, as a hash."""

import hashlib
import json
from typing import Any

from modules.codec import HPCM
from modules.config_history import unlike_first_form


def model_identity(model: HPCM) -> bytes:
    """8 bytes for configuration and weights, but for the weights of g_a and h_a.

    Settings at their defaults do not count, so that one added later leaves the identities of today.
    """
    return _identity(model, model.config.distinguishing())


def earlier_identity(model: HPCM) -> bytes | None:
    """The name by which files of earlier versions know a model whose checkpoint is as old; None for any other."""
    saved = model.saved_config
    return None if saved is None else _identity(model, unlike_first_form(saved))


def _identity(model: HPCM, settings: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] not in {"g_a", "h_a", *model.coding_table_names()}:
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().flatten().numpy())
    return digest.digest()[:8]
