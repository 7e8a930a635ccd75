"""A run that logs through an outbox."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.images import Photos
from pipeline.tracking.model_facts import ModelFacts
from pipeline.tracking.store import EndState, Run

if TYPE_CHECKING:
    from pipeline.tracking.outbox import Outbox

_NAME = re.compile(r"[\w.: /-]+")


class OutboxRun(Run):
    """A run that logs through an outbox."""

    key: str

    def __init__(self, outbox: "Outbox", key: str):
        self.outbox, self.key = outbox, key

    def queue(self, action: str, **arguments: Any) -> None:
        """Add an entry of this run to the outbox."""
        self.outbox.append(self.key, action, arguments)

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.queue("parameters", values={key: str(value)[:6000] for key, value in _flatten(values)})

    def tags(self, values: Mapping[str, Any]) -> None:
        self.queue("tags", values={key: str(value) for key, value in values.items()})

    def dataset(self, photos: Photos, context: str) -> None:
        profile = json.dumps({"images": len(photos.paths), "skipped": len(photos.skipped)})
        source = json.dumps({"uri": photos.source})
        self.queue(
            "dataset", name=photos.name, digest=photos.digest[:36], source=source, profile=profile, context=context
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        last = self.outbox.last_step
        fresh = {key: value for key, value in values.items() if step > last.get((self.key, key), -1)}
        if fresh:
            self.queue("metrics", values=fresh, step=step)

    def samples(self, values: Mapping[str, float]) -> None:
        self.queue("samples", values=dict(values), repeated=True)

    def results(self, values: Mapping[str, float]) -> None:
        self.queue("samples", values=dict(values), repeated=False)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.queue("artifact", name=self.outbox.keep(path), folder=folder)

    def image(self, path: Path, key: str, step: int) -> None:
        self.queue("image", name=self.outbox.keep(path), key=key, step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.queue("table", path=name, columns=list(columns), rows=[list(row) for row in rows])

    def model(self, facts: ModelFacts, build: Callable[[Path], None]) -> None:
        self.queue("model", name=self.outbox.keep_made(facts.stage, build), facts=asdict(facts))

    def end(self, state: EndState) -> None:
        self.queue("end", state=state)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and all(map(_NAME.fullmatch, value)):
            flat += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                flat += _flatten(item, f"{prefix}{key}.{item.get('name', index)}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat
