"""`hpcm compare`: the costs of several codecs, measured in turns and logged to MLflow."""

import json
import os
import re
import statistics
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from modules import HPCMConfig, preset_config
from pipeline.common import files
from pipeline.common.errors import UserError
from pipeline.common.timing import machine
from pipeline.evaluation.coding import macs_per_pixel
from pipeline.evidence.measurement import CODING, MEMORY, TRAINING, Contender, Note, Size, measure_memory, measure_times
from pipeline.recipes.loading import Recipe
from pipeline.tracking import tags
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.store import Store
from pipeline.weights import checkpoints
from pipeline.weights.metadata import read_digest
from pipeline.weights.published import Lineage

KIND = "comparison"
FILE = "comparison.json"
COUNTED_AT = (512, 768)
"""Height and width at which multiplications are counted."""
PHASES = ("baseline", "phase1", "phase2", "phase3", "phase4")


class ComparisonError(UserError):
    """Codecs that cannot be compared. The message says why and what to do."""


@dataclass(frozen=True)
class Cost:
    """Time of one activity of one codec at one size (`512×768`, height × width)."""

    codec: str
    size: str
    activity: str
    seconds: float
    """Median over rounds."""
    ratio: float | None
    """Time relative to the first codec: median of the rounds' ratios, in which load on a whole round cancels."""
    samples: tuple[float, ...]
    """Seconds, one value per round."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of an activity in bytes; None if it ran out of memory or its process died."""

    codec: str
    size: str
    activity: str
    bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """The results of one `hpcm compare`. The other codecs are compared with the first."""

    title: str
    device: str
    machine: str
    torch: str
    rounds: int
    trained: bool
    parameters: dict[str, int]
    kmacs_per_pixel: dict[str, float]
    costs: tuple[Cost, ...]
    peaks: tuple[Peak, ...]

    @property
    def codecs(self) -> list[str]:
        """Names, in the order given."""
        return list(self.parameters)

    @property
    def sizes(self) -> list[str]:
        """Sizes, in the order in which they were measured."""
        return list(dict.fromkeys(cost.size for cost in self.costs))

    def cost(self, codec: str, size: str, activity: str) -> Cost | None:
        """One cost, or None if it was not measured."""
        return next((c for c in self.costs if (c.codec, c.size, c.activity) == (codec, size, activity)), None)

    def peak(self, codec: str, size: str, activity: str) -> int | None:
        """One peak in bytes, or None if it was not measured."""
        found = (p.bytes for p in self.peaks if (p.codec, p.size, p.activity) == (codec, size, activity))
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        """A mapping for JSON that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Comparison":
        """The comparison from the output of `to_json`."""
        costs = tuple(Cost(**{**cost, "samples": tuple(cost["samples"])}) for cost in fields["costs"])
        peaks = tuple(Peak(**peak) for peak in fields["peaks"])
        return cls(**{**fields, "costs": costs, "peaks": peaks})


def of_preset(preset: str) -> list[Contender]:
    """All phases of a preset, untrained; raises ValueError for an unknown preset."""
    configs = [preset_config(preset, phase) for phase in range(len(PHASES))]
    parents = [None, *configs]
    return [
        Contender(name, config, None, parents[phase])
        for phase, (name, config) in enumerate(zip(PHASES, configs, strict=True))
    ]


def of_recipe(recipe: Recipe) -> list[Contender]:
    """The codecs of a recipe's stages, untrained: the longest chains first, parents before children.

    Of equal codecs only the first is included. A control, for example, equals the Baseline. Raises ValueError for
    invalid model settings.
    """
    found: dict[HPCMConfig, Contender] = {}
    configs = {
        name: preset_config(stage.model.preset, stage.model.phase, **stage.model.overrides)
        for name, stage in recipe.stages.items()
    }
    for target in sorted(recipe.stages, key=lambda name: -len(recipe.chain(name))):
        for stage in recipe.chain(target):
            parent = configs[stage.parent] if stage.parent else None
            found.setdefault(configs[stage.name], Contender(stage.name, configs[stage.name], None, parent))
    return list(found.values())


def of_checkpoints(paths: Sequence[Path]) -> list[Contender]:
    """Published codecs, named by their stages, or by their paths if several stages have the same name.

    A codec's parent is looked up among them by the digest in its lineage, or else by name. Raises CheckpointError for a
    file that `load_codec` refuses, ComparisonError for a file given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ComparisonError("a checkpoint is given twice; give each one once")
    configs = {path: checkpoints.load_codec(path).config for path in paths}
    lineages = {path: Lineage.read(path) for path in paths}
    names = {path: lineages[path].name or path.stem for path in paths}
    parents: dict[str, HPCMConfig] = {}
    for path, config in configs.items():
        parents[read_digest(path)] = config
        parents.setdefault(names[path], config)
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    found = []
    for path, config in configs.items():
        lineage = lineages[path]
        by_name = yaml.safe_load(lineage.stage or "{}").get("parent")
        parent = parents.get(lineage.inputs.get("parent", ""), parents.get(by_name))
        name = _short(path, paths) if names[path] in shared else names[path]
        found.append(Contender(name, config, path, parent))
    return found


def _short(path: Path, others: Sequence[Path]) -> str:
    """A path without the folders that all share, in characters that MLflow allows in a metric's name."""
    common = os.path.commonpath([other.resolve().parent for other in others])
    return re.sub(r"[^\w./ -]", "-", path.resolve().relative_to(common).as_posix())


@dataclass(frozen=True)
class Plan:
    """What to measure: sizes for coding, sizes for training steps, number of rounds, and whether memory too."""

    sizes: tuple[Size, ...]
    train_sizes: tuple[Size, ...]
    rounds: int
    memory: bool

    def activities(self) -> dict[Size, tuple[str, ...]]:
        """Activities by size, small sizes first."""
        every = sorted({*self.sizes, *self.train_sizes}, key=lambda size: size[0] * size[1])
        return {
            size: (CODING if size in self.sizes else ()) + (TRAINING if size in self.train_sizes else ())
            for size in every
        }


def compare(title: str, contenders: Sequence[Contender], plan: Plan, device: str, note: Note) -> Comparison:
    """Measure all costs, and call `note` with each step. Raises ComparisonError if nothing fits into memory."""
    kmacs = {}
    for contender in contenders:
        kmacs[contender.name] = macs_per_pixel(contender.config, *COUNTED_AT) / 1000
        note(f"{contender.name}: {kmacs[contender.name]:.1f} kMAC a pixel")
    peaks = _peaks(contenders, plan, device, note) if plan.memory else ()
    samples = measure_times(contenders, plan.activities(), plan.rounds, device, note)
    if not samples:
        raise ComparisonError(f"{title}: nothing fits into the memory of {device}; give smaller sizes or fewer codecs")
    first = contenders[0].name
    costs = []
    for (size, activity, codec), times in samples.items():
        reference = samples.get((size, activity, first))
        ratio = statistics.median(a / b for a, b in zip(times, reference, strict=True)) if reference else None
        costs.append(Cost(codec, size_name(size), activity, statistics.median(times), ratio, tuple(times)))
    return Comparison(
        title, device, machine(device), torch.__version__, plan.rounds,
        all(contender.checkpoint is not None for contender in contenders),
        {contender.name: contender.parameters() for contender in contenders}, kmacs, tuple(costs), tuple(peaks),
    )  # fmt: skip


def _peaks(contenders: Sequence[Contender], plan: Plan, device: str, note: Note) -> list[Peak]:
    peaks = []
    for size, activities in plan.activities().items():
        for activity in activities:
            for contender in contenders:
                if activity not in MEMORY or activity not in contender.activities:
                    continue
                found = measure_memory(contender, size, activity, device)
                peaks.append(Peak(contender.name, size_name(size), activity, found))
                shown = "no figure: out of memory, or its process died" if found is None else f"{found / 2**20:.0f} MiB"
                note(f"{size_name(size)} {activity}, memory of {contender.name}: {shown}")
    return peaks


def size_name(size: Size) -> str:
    """`512×768`, height × width."""
    return f"{size[0]}×{size[1]}"


def default_folder(runs: Path, title: str, device: str) -> Path:
    """The folder to which a comparison is written by default."""
    return runs / "comparisons" / re.sub(r"[^\w.-]+", "-", f"{title}-{device}")


def keep(comparison: Comparison, runs: Path, folder: Path, drawing: Path | None = None) -> bool:
    """Write a comparison as JSON into a folder, and log it, its metrics and the drawing to MLflow.

    Returns False if log entries could not be sent yet.
    """
    files.write_json(folder / FILE, comparison.to_json())
    name = f"compare {comparison.title} on {comparison.device}"
    # Always in the folder of runs, where `hpcm sync` finds it.
    queue = default_folder(runs, comparison.title, comparison.device) / "outbox"
    outbox = Outbox(queue, Store.default(runs), print)
    run = outbox.run(uuid.uuid4().hex, name, tags={tags.KIND: KIND})
    fields = ("title", "device", "machine", "torch", "rounds", "trained")
    run.parameters({field: getattr(comparison, field) for field in fields})
    metrics = {f"{c.codec}/{c.activity}_seconds/{c.size.replace('×', 'x')}": c.seconds for c in comparison.costs}
    metrics |= {
        f"{p.codec}/{p.activity}_bytes/{p.size.replace('×', 'x')}": p.bytes for p in comparison.peaks if p.bytes
    }
    metrics |= {f"{codec}/parameters": count for codec, count in comparison.parameters.items()}
    metrics |= {f"{codec}/kmacs_per_pixel": count for codec, count in comparison.kmacs_per_pixel.items()}
    run.metrics(metrics, 0)
    for path in filter(None, (folder / FILE, drawing)):
        run.artifact(path)
    run.end("FINISHED")
    return outbox.close()


def read(path: Path) -> Comparison:
    """A comparison from its JSON file."""
    return Comparison.from_json(json.loads(path.read_text()))
