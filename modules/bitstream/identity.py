"""The identity of a model in the files that it codes: a hash of everything that a decoder computes with."""

import hashlib
import json
from typing import Any

from modules.codec import HPCM
from modules.config_history import unlike_first_form


def model_identity(model: HPCM) -> bytes:
    """Hash the configuration and the weights, except those of g_a and h_a, to 8 bytes.

    Settings at their defaults are left out, so that a setting added later does not change existing identities.
    """
    return _identity(model, model.config.distinguishing())


def earlier_identity(model: HPCM) -> bytes | None:
    """The identity that earlier versions wrote for this model. None unless its checkpoint has an earlier form."""
    saved = model.saved_config
    return None if saved is None else _identity(model, unlike_first_form(saved))


def _identity(model: HPCM, settings: dict[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] not in {"g_a", "h_a", *model.coding_table_names()}:
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().flatten().numpy())
    return digest.digest()[:8]
