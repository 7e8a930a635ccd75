"""The identity of a model in the files that it codes: a hash of everything that a decoder computes with."""

import hashlib
import json

from modules.bitstream.tables import BUFFERS
from modules.network import HPCMNetwork


def model_identity(model: HPCMNetwork) -> bytes:
    """Hash the configuration and the weights, except those of g_a and h_a, to 8 bytes.

    Settings at their defaults are left out, so that a setting added later does not change existing identities.
    """
    digest = hashlib.sha256(json.dumps(model.config.distinguishing(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] not in {"g_a", "h_a", *BUFFERS}:
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().flatten().numpy())
    return digest.digest()[:8]
