"""`hpcm report`: one self-contained page, made only from MLflow's store."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.common.figure_style import save
from pipeline.common.files import write_text
from pipeline.common.tables import Table, shortest
from pipeline.evidence import (
    comparison,
    comparison_display,
    frontier_figure,
    gains_figure,
    rate_distortion,
    report_tables,
    training_curves,
)
from pipeline.evidence.comparison import Comparison
from pipeline.evidence.control_gains import Claim, claims, gains
from pipeline.evidence.reconstructions import SIDE, ComparedCrop, compared_crops
from pipeline.tracking.records import ChainRecord, Records, StageRecord

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
    """The results of one recipe's chains."""

    recipe: str
    facts: tuple[tuple[str, str], ...]
    curves: str
    """The figure, as a data URI."""
    several_lmbdas: bool
    deltas: Table
    claims: dict[str, list[Claim]]
    """By quantity, for Phases 1 to 4; empty if the recipe has none of them."""
    gains: str
    """The figure of gains against controls, as a data URI; empty if the recipe has no controls."""
    frontier: str
    """The figure of rate against multiplications, as a data URI; empty if fewer than two stages have a control."""
    quality: Table
    uncontrolled: tuple[str, ...]
    """Stages without a control. They have no gain."""
    migration: Table
    training: tuple[tuple[str, str], ...]
    """Title and figure of each chain."""
    compared_crops: tuple[ComparedCrop, ...]
    crops_from: str
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
    side: int = SIDE
    """Side of the shown crops in pixels."""


def write(runs: Path, folder: Path, recipes: Sequence[str] = ()) -> Path:
    """Write the page and its figures into a folder; returns the page's path.

    `recipes` names the recipes to report on, in this order; without any, all in the store. Raises ReportError if one of
    them has no published stage.
    """
    records = Records(runs)
    chains = records.published_chains()
    there = sorted({chain.recipe for chain in chains}, key=lambda recipe: -_stages_of(chains, recipe))
    unknown = [recipe for recipe in recipes if recipe not in there]
    if unknown or not there:
        known = f"; there are {', '.join(there)}" if there else ""
        raise ReportError(f"{runs}: no published stage of {' or '.join(unknown) or 'any recipe'} in its store{known}")
    costs = [comparison.read(path) for path in records.artifacts_of_kind(comparison.KIND, comparison.FILE)]
    newest = {(cost.title, cost.device): cost for cost in costs}
    drawn = _Drawn(folder)
    page = Page(
        sections=tuple(
            _recipe_report(records, [c for c in chains if c.recipe == name], newest, drawn) for name in recipes or there
        ),
        costs=tuple(_cost_report(cost, drawn) for cost in newest.values()),
        date=_date(max(stage.ended for chain in chains for stage in chain.stages)),
    )
    path = folder / PAGE
    write_text(path, _template().render(page=page))
    return path


def _cost_report(cost: Comparison, drawn: "_Drawn") -> CostReport:
    figure = drawn.add(f"cost-{cost.title}-{cost.device}", comparison_display.draw(cost))
    return CostReport(cost, tuple(comparison_display.tables(cost)), figure)


def _stages_of(chains: Sequence[ChainRecord], recipe: str) -> int:
    return sum(len(chain.published) for chain in chains if chain.recipe == recipe)


def _recipe_report(
    records: Records, chains: list[ChainRecord], costs: dict[tuple[str, str], Comparison], drawn: "_Drawn"
) -> RecipeReport:
    chains = sorted(chains, key=lambda chain: (chain.lmbda, chain.seed))
    recipe = chains[0].recipe
    curves = rate_distortion.curves(chains)
    figure = rate_distortion.draw(curves, rate_distortion.all_on_kodak(records, chains))
    best = _fullest(chains)
    fair = [gain for gain in gains(chains) if gain.fair and gain.rate_percent]
    here = [gain for gain in fair if gain.lmbda == best.lmbda]
    return RecipeReport(
        recipe=recipe,
        facts=tuple(_facts(records, chains)),
        curves=drawn.add(f"{recipe}-rate-distortion", figure),
        several_lmbdas=len({chain.lmbda for chain in chains}) > 1,
        deltas=rate_distortion.deltas_table(
            curves, rate_distortion.references(chains), rate_distortion.uncontrolled(chains)
        ),
        claims=_claims(chains, curves, costs),
        gains=drawn.add(f"{recipe}-gains", gains_figure.draw(fair)) if fair else "",
        frontier=drawn.add(f"{recipe}-frontier", frontier_figure.draw(best, here)) if len(here) > 1 else "",
        quality=report_tables.quality_table(chains),
        uncontrolled=tuple(sorted(rate_distortion.uncontrolled(chains))),
        migration=report_tables.migration_table(chains),
        training=tuple(
            (
                chain.title,
                drawn.add(
                    f"{recipe}-training-{shortest(chain.lmbda)}-seed-{chain.seed}", training_curves.draw(records, chain)
                ),
            )
            for chain in chains
            if chain is best or chain.seed == best.seed
        ),
        compared_crops=tuple(compared_crops(records, best)),
        crops_from=best.title,
        lineage=tuple((chain.title, node) for chain in chains for node in _lineage(chain, None)),
    )


def _fullest(chains: Sequence[ChainRecord]) -> ChainRecord:
    """The chain with most stages. If several have as many: the middle λ, then the first seed."""
    most = max(len(chain.published) for chain in chains)
    full = [chain for chain in chains if len(chain.published) == most]
    lmbdas = sorted({chain.lmbda for chain in full})
    return next(chain for chain in full if chain.lmbda == lmbdas[len(lmbdas) // 2])


def _facts(records: Records, chains: Sequence[ChainRecord]) -> Iterator[tuple[str, str]]:
    """Codec, λ, seeds, validation, training and time."""
    stages = [stage for chain in chains for stage in chain.published.values()]
    first = stages[0]
    size = f"{first.metrics['model/parameters'] / 1e6:.1f} M parameters"
    yield "codec", f"{first.parameters['model.preset']}, {size} as {first.name}"
    yield "λ", ", ".join(shortest(lmbda) for lmbda in sorted({chain.lmbda for chain in chains}))
    yield "seeds", ", ".join(map(str, sorted({chain.seed for chain in chains})))
    images = records.validation_images(first)
    yield "validation", f"{len(images)} whole images"
    yield "training", f"crops of {first.parameters['data.crop']}², batches of {first.parameters['data.batch_size']}"
    minutes = sum(stage.seconds or 0 for stage in stages) / 60
    spent = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    yield "time", f"{spent} of training steps in {len(stages)} stages"


def _claims(
    chains: Sequence[ChainRecord], curves: dict[str, rate_distortion.Curve], costs: dict[tuple[str, str], Comparison]
) -> dict[str, list[Claim]]:
    names = {name for chain in chains for name in chain.published}
    if not names & {f"phase{n}" for n in range(1, 5)}:
        return {}
    titles = (chains[0].recipe, "checkpoints")
    fitting = [cost for (title, _), cost in costs.items() if title in titles and "phase4" in cost.codecs]
    uncontrolled = rate_distortion.uncontrolled(chains)
    controls = {name: of for name, of in rate_distortion.references(chains).items() if name not in uncontrolled}
    deltas = rate_distortion.deltas(curves, controls)
    found: dict[str, list[Claim]] = {}
    for claim in claims(gains(chains), deltas, fitting[-1] if fitting else None):
        found.setdefault(claim.quantity, []).append(claim)
    return {q: row for q, row in found.items() if any(claim.measured or not claim.fair for claim in row)}


def _lineage(chain: ChainRecord, parent: str | None) -> list[LineageNode]:
    """The trees of published stages whose parent is `parent`."""
    found = [stage for stage in chain.published.values() if stage.parent == parent]
    return [LineageNode(stage, tuple(_lineage(chain, stage.name))) for stage in found]


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


def _date(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%-d %B %Y")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evidence", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"picture": _picture, "claim": _claim_text, "expected": _expected_text}
    template: Any = environment.get_template(PAGE)
    return template


def _claim_text(claim: Claim) -> str:
    """`−2.3 ± 0.4 %`."""
    if claim.measured is None:
        return "–" if claim.fair else "no control"
    unit, form = _unit(claim)
    return f"{claim.measured.text(form)} {unit}".replace("-", "−")


def _expected_text(claim: Claim) -> str:
    """`−30 … −45 %`, the end nearer to 0 first."""
    unit, _ = _unit(claim)
    near, far = sorted(claim.expected, key=abs)
    return f"{near:+g} … {far:+g} {unit}".replace("-", "−")


def _unit(claim: Claim) -> tuple[str, str]:
    return ("dB", "+.2f") if claim.quantity.startswith("psnr") else ("%", "+.1f")
