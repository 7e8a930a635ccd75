"""A codec in a folder or on the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin
from safetensors.torch import save_file
from torch import Tensor

from modules.loading import codec_tensors, read_tensors, state_digest
from modules.network import HPCMNetwork
from modules.saved_codec import CONFIG, LINEAGE, WEIGHTS, read_config, read_header, weights_file

_CARD = """---
{{ card_data }}
---

# HPCM, a learned image codec

{{ parameters }} parameters. {{ origin }}

Components of the context model:

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

    lineage: Mapping[str, Any]
    """What the file of the weights says about their origin: λ, metric, quality, the stages before. It may be empty."""

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make an instance, without the mixin's record of the arguments. `_save_pretrained` saves the configuration."""
        return object.__new__(cls)

    @classmethod
    def from_tensors(cls, values: Any, tensors: Mapping[str, Tensor], lineage: Mapping[str, Any]) -> Self:
        """Build the codec that is saved. Raises ValueError if configuration and weights do not fit each other."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a codec in evaluation mode, with its coding tables built.

        The source is a folder of `save_pretrained` or of a published stage, the safetensors file in it, or a name on
        the Hub. `options` are those of `hf_hub_download`, such as `revision`. Raises ValueError, which names the
        source, if the weights do not fit their configuration or their digest, and OSError if there are none.
        """
        path = weights_file(pretrained_model_name_or_path, **options)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder, and not a name on the Hugging Face Hub")
        known = read_header(path) or read_config(path)
        if "config" not in known:
            raise ValueError(f"{path}: no configuration in its metadata or in {CONFIG}; give a published stage")
        tensors = read_tensors(path, known.get("digest"))
        try:
            return cls.from_tensors(known.pop("config"), tensors, known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = codec_tensors(self)
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        save_file(kept, save_directory / WEIGHTS, {"format": "pt"})
        values = {**self.config.to_dict(), LINEAGE: {**self._known_origin(), "digest": state_digest(kept)}}
        (save_directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n")

    def _known_origin(self) -> Mapping[str, Any]:
        """The lineage; empty if the weights changed since they were loaded."""
        return self.lineage if state_digest(codec_tensors(self)) == self.lineage.get("digest") else {}

    def generate_model_card(self, *arguments: Any, **options: Any) -> ModelCard:
        """The model card: number of parameters, λ, quality, components, and how to load the codec."""
        count = sum(parameter.numel() for parameter in self.parameters())
        rows = []
        for slot, kind in self.config.components.items():
            settings = ", ".join(f"{name} {value}" for name, value in asdict(kind).items())
            rows.append(f"| `{slot}` | {kind.name} | {settings} |")
        facts = {
            "parameters": f"{count / 1e6:.2f} M",
            "origin": origin_text(self._known_origin()),
            "components": "\n".join(rows),
        }
        return super().generate_model_card(*arguments, **{**facts, **options})


def origin_text(lineage: Mapping[str, Any]) -> str:
    """What is known of a codec's origin, in sentences."""
    quality, sentences = lineage.get("quality"), []
    if lineage.get("lmbda"):
        sentences.append(f"Trained for λ = {lineage['lmbda']:g} ({lineage.get('metric')}).")
    if lineage.get("name"):
        parent = str(lineage.get("inputs", {}).get("parent", ""))[:12]
        sentences.append(f"Stage `{lineage['name']}`" + (f", from the weights {parent}." if parent else "."))
    if quality:
        images = len(lineage.get("validation", {}).get("images", ()))
        similarity = f", MS-SSIM {quality['ms_ssim']:.4f}" if quality.get("ms_ssim") is not None else ""
        sentences.append(
            f"Measured on {images} validation images: {quality['bpp']:.4f} bpp, "
            f"PSNR {quality['psnr_db']:.2f} dB{similarity}."
        )
    return " ".join(sentences) or "Their training is not recorded."
