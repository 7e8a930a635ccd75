"""A codec in a folder or on the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modules.loading import codec_tensors
from modules.network import HPCMNetwork

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
PUBLISHED = "checkpoint.safetensors"
"""Name of the weights in the folder of a published stage. Their configuration is in the file's metadata."""

_CARD = """---
{{ card_data }}
---

# HPCM, a learned image codec

{{ parameters }} parameters. Components of the context model:

| slot | kind | settings |
|---|---|---|
{{ components }}

```python
from modules import HPCM

model = HPCM.from_pretrained("folder or name")
coded = model.compress(images)  # (B, 3, H, W) in [0, 1], any size
x_hat = model.decompress(**coded)["x_hat"]
```

The codec is a `CompressionModel` of CompressAI. Only these weights can decode what they coded. Paper: {{ paper_url }}
"""


class Pretrained(
    ModelHubMixin,
    HPCMNetwork,
    model_card_template=_CARD,
    paper_url="https://arxiv.org/abs/2507.19125",
    library_name="hpcm-rwkv",
    license="mit",
    tags=["image-compression", "learned-image-compression", "compressai", "rwkv"],
):
    """Saves and loads a codec with Hugging Face's mixin. The coding tables are not saved."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make an instance, without the mixin's record of the arguments. `_save_pretrained` saves the configuration."""
        return object.__new__(cls)

    @classmethod
    def from_tensors(cls, values: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Build the codec that is saved. Raises ValueError if configuration and weights do not fit each other."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a codec in evaluation mode, with its coding tables built.

        The source is a folder of `save_pretrained`, the folder of a published stage, or a name on the Hub. `options`
        are those of Hugging Face's mixin, such as `revision`. Raises ValueError, which names the source, if the weights
        do not fit their configuration, and OSError if there is no such folder or no weights in it.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_file():
            raise NotADirectoryError(f"{folder}: a file; give the folder that contains it")
        # Hugging Face's message about such a path would only say that it is no name.
        if not folder.is_dir() and not re.fullmatch(HUB_NAME, str(pretrained_model_name_or_path)):
            raise FileNotFoundError(f"{folder}: no such folder, and not a name on the Hugging Face Hub")
        if folder.is_dir() and not (folder / CONFIG).exists():
            return cls._from_published(folder)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_published(cls, folder: Path) -> Self:
        """Load the weights of a published stage. Their digest is not checked here; `pipeline.weights` checks it."""
        path = folder / PUBLISHED
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder}: this folder has neither {CONFIG} and {WEIGHTS} nor a published stage's {PUBLISHED}"
            )
        tensors, metadata = _read(path)
        try:
            values = json.loads(metadata["hpcm"])["config"]
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: its metadata has no configuration; give a published stage") from error
        return cls._built(path, values, tensors)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        download = {key: options[key] for key in ("revision", "cache_dir", "force_download", "local_files_only")}
        download["token"] = options["token"]
        here = Path(model_id)
        weights, config = (
            here / name if here.is_dir() else Path(hf_hub_download(model_id, name, **download))
            for name in (WEIGHTS, CONFIG)
        )
        try:
            values = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config}: not JSON: {error}") from error
        return cls._built(weights, values, _read(weights)[0])

    @classmethod
    def _built(cls, source: Path, values: Any, tensors: Mapping[str, Tensor]) -> Self:
        try:
            return cls.from_tensors(values, tensors)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = codec_tensors(self)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        save_file(kept, save_directory / WEIGHTS, {"format": "pt"})
        (save_directory / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    def generate_model_card(self, *arguments: Any, **options: Any) -> ModelCard:
        """The model card: number of parameters, components, and how to load the codec."""
        count = sum(parameter.numel() for parameter in self.parameters())
        rows = []
        for slot, kind in self.config.components.items():
            settings = ", ".join(f"{name} {value}" for name, value in asdict(kind).items())
            rows.append(f"| `{slot}` | {kind.name} | {settings} |")
        facts = {"parameters": f"{count / 1e6:.2f} M", "components": "\n".join(rows)}
        return super().generate_model_card(*arguments, **{**facts, **options})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
