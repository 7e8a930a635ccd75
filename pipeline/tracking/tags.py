"""The `hpcm.*` tags of MLflow's runs. Only these classes write and read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipeline.common.errors import UserError

KEY = "hpcm.key"
"""Tag by which a run is found."""
KIND = "hpcm.kind"
"""Tag of runs outside chains, such as `comparison`."""
STAGE = "hpcm.stage"
"""Tag that only runs of stages have."""

_INPUT, _ATTEMPT = "hpcm.input.", "hpcm.attempt."


class TagError(UserError):
    """A run has tags that this program did not write."""


@dataclass(frozen=True)
class ChainTags:
    """The chain of a run. Runs of stages have these tags too."""

    recipe: str
    lmbda: float
    seed: int

    def to_tags(self) -> dict[str, str]:
        """The tags by name."""
        return {"hpcm.recipe": self.recipe, "hpcm.lmbda": repr(self.lmbda), "hpcm.seed": str(self.seed)}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str], run: str) -> "ChainTags":
        """Read from MLflow's tags. Raises TagError, naming the run and the tag."""
        return cls(
            _needed(tags, "hpcm.recipe", str, run),
            _needed(tags, "hpcm.lmbda", float, run),
            _needed({"hpcm.seed": "0", **tags}, "hpcm.seed", int, run),
        )


@dataclass(frozen=True)
class StageTags:
    """The results of a stage. A field that is not known yet is None or empty."""

    stage: str | None = None
    key: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of its inputs, by name."""
    ledger: str | None = None
    """How many tensors were copied, renamed, …: `12 copied, 3 dropped`."""
    step0_loss: float | None = None
    """Estimated R-D loss on the validation images before the first step."""
    acceptance: str | None = None
    checkpoint: str | None = None
    """The published file, relative to the folder of runs."""
    checkpoint_digest: str | None = None
    """Digest of the published weights."""
    attempts: dict[int, str] = field(default_factory=dict)
    """How each attempt began and what ended it, by start time in ms since 1970. The tag's text repeats the time."""

    def to_tags(self) -> dict[str, str]:
        """The known tags by name."""
        named: dict[str, Any] = {
            STAGE: self.stage, KEY: self.key, "hpcm.ledger": self.ledger, "hpcm.step0_loss": self.step0_loss,
            "hpcm.acceptance": self.acceptance, "hpcm.checkpoint": self.checkpoint,
            "hpcm.checkpoint_digest": self.checkpoint_digest,
        }  # fmt: skip
        named |= {f"{_INPUT}{name.replace(' ', '_')}": digest for name, digest in self.inputs.items()}
        named |= {f"{_ATTEMPT}{time}": f"{_utc(time)}: {text}" for time, text in self.attempts.items()}
        return {tag: str(value) for tag, value in named.items() if value is not None}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str], run: str) -> "StageTags":
        """Read from MLflow's tags. Raises TagError, naming the run and the tag."""
        loss = _needed(tags, "hpcm.step0_loss", float, run) if "hpcm.step0_loss" in tags else None
        inputs = {tag.removeprefix(_INPUT).replace("_", " "): v for tag, v in tags.items() if tag.startswith(_INPUT)}
        begun = {tag.removeprefix(_ATTEMPT): v for tag, v in sorted(tags.items()) if tag.startswith(_ATTEMPT)}
        return cls(
            stage=_needed(tags, STAGE, str, run),
            key=tags.get(KEY),
            inputs=inputs,
            ledger=tags.get("hpcm.ledger"),
            step0_loss=loss,
            acceptance=tags.get("hpcm.acceptance"),
            checkpoint=tags.get("hpcm.checkpoint"),
            checkpoint_digest=tags.get("hpcm.checkpoint_digest"),
            attempts={int(time): _without_time(int(time), text) for time, text in begun.items() if time.isdecimal()},
        )


def _utc(time: int) -> str:
    """A time in ms since 1970, as readable text."""
    return f"{datetime.fromtimestamp(time / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _without_time(time: int, text: str) -> str:
    return text.removeprefix(f"{_utc(time)}: ")


def _needed(tags: Mapping[str, str], tag: str, kind: type[Any], run: str) -> Any:
    try:
        return kind(tags[tag])
    except (LookupError, ValueError) as error:
        found = repr(tags[tag]) if tag in tags else "missing"
        raise TagError(f"MLflow's run {run}: the tag {tag} is {found}; this program did not write it") from error
