"""Earlier forms of a codec's configuration, which old checkpoints hold."""

import json
from collections.abc import Mapping
from typing import Any

_FLAT: dict[str, Any] = {
    "heads": 32,
    "windows": (4, 8, 8),
    "prior_depths": ((2, 1), (3, 2)),
    "attn_hidden_rates": (2, 3, 4),
    "fusion_blocks": 1,
    "fusion_hidden_rate": 4,
    "prior_blocks": (2, 3),
    "prior_last_blocks": (1, 2),
    "prior_hidden_rate": 4,
    "mix_rate": 1,
}
"""Component settings of the first form, with their defaults."""
_DEFAULTS: dict[str, Any] = {
    "M": 320,
    "N": 256,
    "widths": (96, 192, 384),
    "depths": (2, 2, 4),
    **dict.fromkeys(("attn_s1", "attn_s2", "attn_s3"), "cross-attention"),
    "context_net": "conv",
    **dict.fromkeys(("y_spatial_prior_s1_s2", "y_spatial_prior_s3"), "dwconv"),
    **_FLAT,
}
"""All settings of the first form, with their defaults."""


def is_first_form(values: Mapping[str, Any]) -> bool:
    """Whether this is a configuration of the first form."""
    return bool(values.keys() & _FLAT.keys())


def unlike_first_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a first-form configuration that differ from their defaults."""
    defaults = json.loads(json.dumps(_DEFAULTS))
    return {name: value for name, value in json.loads(json.dumps(values)).items() if value != defaults[name]}


def from_flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a first-form configuration to the current form, which has a mapping for each slot.

    The first form gave only the kind of each slot (`attn_s3: rwkv`) and kept all settings at the top level. A
    configuration of another form is returned unchanged.
    """
    if not is_first_form(values):
        return dict(values)
    new = {name: value for name, value in values.items() if name not in _FLAT}
    values = {**_FLAT, **values}
    for scale, slot in enumerate(("attn_s1", "attn_s2", "attn_s3")):
        new[slot] = {
            "cross-attention": {"heads": values["heads"], "window": values["windows"][scale]},
            "rwkv": {"hidden_rate": values["attn_hidden_rates"][scale], "mix_rate": values["mix_rate"]},
            "none": {},
        }[values[slot]] | {"kind": values[slot]}
    fusion = {name.removeprefix("fusion_"): values[name] for name in ("fusion_blocks", "fusion_hidden_rate")}
    new["context_net"] = {"conv": {}, "rwkv": {**fusion, "mix_rate": values["mix_rate"]}}[values["context_net"]] | {
        "kind": values["context_net"]
    }
    for scale, slot in enumerate(("y_spatial_prior_s1_s2", "y_spatial_prior_s3")):
        depths = values["prior_depths"][scale]
        new[slot] = {
            "dwconv": {"blocks": depths[0], "last_blocks": depths[1]},
            "rwkv": {
                "blocks": values["prior_blocks"][scale],
                "last_blocks": values["prior_last_blocks"][scale],
                "hidden_rate": values["prior_hidden_rate"],
                "mix_rate": values["mix_rate"],
            },
        }[values[slot]] | {"kind": values[slot]}
    return new
