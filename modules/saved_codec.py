"""A codec's file of weights: where it lies, what it says about the codec, and the digest of its tensors.

This module does not import PyTorch, so that a file can be described at once.
"""

import hashlib
import json
import mmap
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

WEIGHTS, CONFIG = "model.safetensors", "config.json"
"""The files of `save_pretrained`."""
PUBLISHED = "checkpoint.safetensors"
"""Name of the weights in the folder of a published stage. Their configuration is in the file's metadata."""
METADATA_KEY, LINEAGE = "hpcm", "lineage"
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+(?<!\.safetensors)(?<!\.tar)(?<!\.pth)(?<!\.pt)"
"""Pattern of an owner and a codec's name on the Hugging Face Hub."""
PATIENCE = 3.0
"""Seconds to wait for the Hub's first answer."""
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""PyTorch's names of the types in a safetensors file."""


def weights_file(source: str | Path, **download: Any) -> Path:
    """The file of a codec's weights, which may be given as this file, as its folder, or as a name on the Hub.

    The folder is one of `save_pretrained` or of a published stage. `download` are options of Hugging Face's
    `hf_hub_download`, such as `revision`. Raises FileNotFoundError, which names the source.
    """
    place = Path(source)
    if place.is_dir():
        for name in (PUBLISHED, WEIGHTS):
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(
            f"{place}: this folder has neither a published stage's {PUBLISHED} nor {WEIGHTS} and {CONFIG}"
        )
    if not place.exists() and re.fullmatch(HUB_NAME, str(source)):
        return _from_hub(str(source), download)
    return place


def _from_hub(name: str, download: dict[str, Any]) -> Path:
    """Download a codec from the Hugging Face Hub. Without a connection, use what was downloaded before."""
    try:
        # `hf_hub_download` would repeat this request for 23 s if there is no connection.
        address = huggingface_hub.hf_hub_url(name, CONFIG, revision=download.get("revision"))
        huggingface_hub.get_hf_file_metadata(address, token=download.get("token"), timeout=PATIENCE)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # The Hub refuses the name, and the download raises the same error.
    except Exception:  # Hugging Face passes on the errors of a library that it may change.
        download = {**download, "local_files_only": True}
    try:
        huggingface_hub.hf_hub_download(name, CONFIG, **download)
        return Path(huggingface_hub.hf_hub_download(name, WEIGHTS, **download))
    except (OSError, ValueError) as error:
        reason = "the Hugging Face Hub was not reached, and the codec was not downloaded before"
        if "local_files_only" not in download:
            reason = f"the Hugging Face Hub: {str(error).strip().splitlines()[0]}"
        raise FileNotFoundError(f"{name}: no such file or folder here; {reason}") from error


def read_header(path: Path) -> dict[str, Any]:
    """What the metadata of a safetensors file say about its codec; empty for a file of another program.

    Raises ValueError, which names the file, if it is not a safetensors file.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    return header if isinstance(header, dict) else {}


def read_config(path: Path) -> dict[str, Any]:
    """What the `config.json` beside a file of weights says about its codec; empty if there is none.

    Raises ValueError, which names the file, if it is not a JSON mapping.
    """
    config = path.with_name(CONFIG)
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_bytes())
        lineage = values.pop(LINEAGE, {})
        return {"digest": weights_digest(path), **lineage, "config": values}
    except (ValueError, RecursionError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{config}: not the configuration of a codec: {error}") from error


def check_digest(path: Path, known: Any) -> None:
    """Raise ValueError, which names the file, if the digest of its tensors is not the known one."""
    if weights_digest(path) != known:
        raise ValueError(f"{path}: the weights do not match their digest; the file is damaged")


def weights_digest(path: Path) -> str:
    """SHA-256 of a safetensors file's tensors, in hexadecimal. It is `state_digest` of what the file holds.

    Raises ValueError for a file that is not readable as safetensors.
    """
    read_header(path)  # This checks the header and the place of each tensor.
    digest = hashlib.sha256()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        for name in sorted(entries.keys() - {"__metadata__"}):
            shape, (begin, end) = entries[name]["shape"], entries[name]["data_offsets"]
            dtype = DTYPES.get(entries[name]["dtype"], "another type")
            values = hashlib.sha256(content[start + begin : start + end]).hexdigest()
            digest.update(f"{name} torch.{dtype} {shape} {values}\n".encode())
    return digest.hexdigest()
