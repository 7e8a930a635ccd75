"""`hpcm report`: one self-contained page about the chains and comparisons in a folder of runs."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.common.figure_style import save
from pipeline.common.files import write_text
from pipeline.common.tables import Table, shortest
from pipeline.evidence import comparison as comparisons
from pipeline.evidence import figures, rate_distortion, report_tables
from pipeline.evidence.gains import gains
from pipeline.evidence.reconstructions import ComparedCrop, compared_crops
from pipeline.records.chains import ChainRecord, read_chains
from pipeline.records.comparison import Comparison, read_comparisons
from pipeline.records.record import StageRecord

PAGE = "report.html"


class ReportError(UserError):
    """There is nothing to report on."""


@dataclass(frozen=True)
class LineageNode:
    """A stage in the lineage and its children."""

    stage: StageRecord
    children: tuple["LineageNode", ...]


@dataclass(frozen=True)
class RecipeReport:
    """The results of one recipe's chains. Figures are data URIs, empty if there is nothing to draw."""

    recipe: str
    facts: tuple[tuple[str, str], ...]
    story: Table
    quality: Table
    gains: Table
    """Without rows if no stage has a control."""
    deltas: Table
    gains_figure: str
    frontier: str
    curves: str
    training: tuple[tuple[str, str], ...]
    """Title and figure of each chain."""
    compared_crops: tuple[ComparedCrop, ...]
    shown: str
    """Title of the chain whose reconstructions and frontier are shown."""
    lineage: tuple[tuple[str, LineageNode], ...]


@dataclass(frozen=True)
class CostReport:
    """One comparison of costs, with its tables and its figure as a data URI."""

    comparison: Comparison
    tables: tuple[Table, ...]
    figure: str


@dataclass(frozen=True)
class Page:
    """The content of the page."""

    sections: tuple[RecipeReport, ...]
    costs: tuple[CostReport, ...]
    date: str
    """When the last stage ended."""


def write(runs: Path, folder: Path, recipes: Sequence[str] = ()) -> Path:
    """Write the page and its figures into a folder; returns the page's path.

    `recipes` names the recipes to report on, in this order; without any, all in the folder of runs. Raises ReportError
    if one of them has no published stage.
    """
    chains = [chain for chain in read_chains(runs) if chain.published]
    there = sorted({chain.recipe for chain in chains}, key=lambda recipe: -_stages_of(chains, recipe))
    unknown = [recipe for recipe in recipes if recipe not in there]
    if unknown or not there:
        known = f"; there are {', '.join(there)}" if there else ""
        raise ReportError(f"{runs}: no published stage of {' or '.join(unknown) or 'any recipe'}{known}")
    newest = {(cost.title, cost.device): cost for cost in read_comparisons(runs)}
    drawn = _Drawn(folder)
    ended = [stage.record.ended or 0 for chain in chains for stage in chain.published.values()]
    page = Page(
        sections=tuple(_recipe_report([c for c in chains if c.recipe == name], drawn) for name in recipes or there),
        costs=tuple(_cost_report(cost, drawn) for cost in newest.values()),
        date=datetime.fromtimestamp(max(ended) / 1000, UTC).strftime("%-d %B %Y"),
    )
    path = folder / PAGE
    write_text(path, _template().render(page=page))
    return path


def _cost_report(cost: Comparison, drawn: "_Drawn") -> CostReport:
    figure = drawn.add(f"cost-{cost.title}-{cost.device}", comparisons.draw(cost))
    return CostReport(cost, tuple(comparisons.tables(cost)), figure)


def _stages_of(chains: Sequence[ChainRecord], recipe: str) -> int:
    return sum(len(chain.published) for chain in chains if chain.recipe == recipe)


def _recipe_report(chains: list[ChainRecord], drawn: "_Drawn") -> RecipeReport:
    chains = sorted(chains, key=lambda chain: (chain.lmbda, chain.seed))
    recipe, best = chains[0].recipe, _fullest(chains)
    curves, found = rate_distortion.curves(chains), gains(chains)
    rated = [gain for gain in found if gain.rate_percent]
    here = [gain for gain in rated if gain.lmbda == best.lmbda]
    return RecipeReport(
        recipe=recipe,
        facts=tuple(_facts(chains)),
        story=report_tables.story_table(chains),
        quality=report_tables.quality_table(chains),
        gains=report_tables.gains_table(found),
        deltas=rate_distortion.deltas_table(curves, rate_distortion.controls(chains)),
        gains_figure=drawn.add(f"{recipe}-gains", figures.gains(rated)) if rated else "",
        frontier=drawn.add(f"{recipe}-frontier", figures.frontier(best, here)) if len(here) > 1 else "",
        curves=drawn.add(f"{recipe}-rate-distortion", figures.curves(curves, rate_distortion.all_on_kodak(chains))),
        training=tuple(
            (chain.title, drawn.add(f"{recipe}-training-{chain.folder.name}", figures.training(chain)))
            for chain in chains
            if chain is best or chain.seed == best.seed
        ),
        compared_crops=tuple(compared_crops(best)),
        shown=best.title,
        lineage=tuple((chain.title, node) for chain in chains for node in _lineage(chain, None)),
    )


def _fullest(chains: Sequence[ChainRecord]) -> ChainRecord:
    """The chain with most stages. If several have as many: the middle λ, then the first seed."""
    most = max(len(chain.published) for chain in chains)
    full = [chain for chain in chains if len(chain.published) == most]
    lmbdas = sorted({chain.lmbda for chain in full})
    return next(chain for chain in full if chain.lmbda == lmbdas[len(lmbdas) // 2])


def _facts(chains: Sequence[ChainRecord]) -> Iterator[tuple[str, str]]:
    """Codec, λ, seeds, validation, training and time."""
    records = [stage.record for chain in chains for stage in chain.published.values()]
    first, data = records[0], records[0].settings["data"]
    yield "codec", f"preset {first.settings['model']['preset']}"
    yield "λ", ", ".join(shortest(lmbda) for lmbda in sorted({chain.lmbda for chain in chains}))
    yield "seeds", ", ".join(map(str, sorted({chain.seed for chain in chains})))
    images = len(first.evaluated.evaluation.images)
    yield "validation", f"{images} whole image{'s' if images > 1 else ''} ({first.val_images.name})"
    yield "training", f"crops of {data['crop']}², batches of {data['batch_size']} ({first.train_images.name})"
    minutes = sum(record.trained.seconds for record in records) / 60
    spent = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    yield "time", f"{spent} of training steps in {len(records)} stages"


def _lineage(chain: ChainRecord, parent: str | None) -> list[LineageNode]:
    """The trees of published stages whose parent is `parent`."""
    found = [stage.record for stage in chain.published.values() if stage.record.parent == parent]
    return [LineageNode(record, tuple(_lineage(chain, record.name))) for record in found]


class _Drawn:
    """Figures of the page. Each is embedded, and saved as a PNG beside the page."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, figure: Figure) -> str:
        """Save a figure; returns it as a data URI."""
        save(figure, self._folder / (re.sub(r"[^\w.-]+", "-", name) + ".png"))
        file = io.BytesIO()
        save(figure, file, "svg")
        return _data_uri(file.getvalue(), "svg+xml")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _picture(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) in 8 bits as the data URI of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return _data_uri(file.getvalue(), "png")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evidence", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["picture"] = _picture
    return environment.get_template(PAGE)
