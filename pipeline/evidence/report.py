"""`hpcm report`: one self-contained page about the chains and comparisons in a folder of runs."""

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pipeline.common.errors import UserError
from pipeline.common.figure_style import save
from pipeline.common.files import write_text
from pipeline.common.tables import shortest
from pipeline.evidence import comparison as comparisons
from pipeline.evidence import figures, rate_distortion, report_tables
from pipeline.evidence.gains import gains
from pipeline.evidence.reconstructions import compared_crops
from pipeline.records.chains import ChainRecord, read_chains
from pipeline.records.comparison import read_comparisons

PAGE = "report.html"


class ReportError(UserError):
    """There is nothing to report on."""


def write(runs: Path, folder: Path, recipes: Sequence[str] = (), reference: str | None = None) -> Path:
    """Write the page and its figures into a folder; returns the page's path.

    `recipes` names the recipes to report on, in this order; without any, all in the folder of runs. `reference` is a
    `recipe/stage` with which all stages are compared. Raises ReportError if one of them has no published stage.
    """
    by_recipe: dict[str, list[ChainRecord]] = {}
    for chain in (chain for chain in read_chains(runs) if chain.published):
        by_recipe.setdefault(chain.recipe, []).append(chain)
    there = sorted(by_recipe, key=lambda recipe: (-sum(len(c.published) for c in by_recipe[recipe]), recipe))
    unknown = [recipe for recipe in recipes if recipe not in there]
    if unknown or not there:
        known = f"; there are {', '.join(there)}" if there else ""
        raise ReportError(f"{runs}: no published stage of {' or '.join(unknown) or 'any recipe'}{known}")
    curves = {f"{r}/{name}": c for r in there for name, c in rate_distortion.curves(by_recipe[r]).items()}
    if reference is not None and reference not in curves:
        raise ReportError(f"{runs}: no published stage {reference}; there are {', '.join(curves)}")
    shown = [name for name in curves if name.partition("/")[0] in (recipes or there) and name != reference]
    folder.mkdir(parents=True, exist_ok=True)
    newest = {(cost.title, cost.device): cost for cost in read_comparisons(runs)}
    stages = (stage.record for chains in by_recipe.values() for chain in chains for stage in chain.published.values())
    page = {
        "date": datetime.fromtimestamp(max(record.ended or 0 for record in stages) / 1000, UTC).strftime("%-d %B %Y"),
        "against": rate_distortion.deltas_table(curves, dict.fromkeys(shown, reference)) if reference else None,
        "sections": [_section(by_recipe[recipe], partial(_drawn, folder)) for recipe in recipes or there],
        "costs": [
            {
                "comparison": cost,
                "tables": comparisons.tables(cost),
                "figure": _drawn(folder, f"cost-{cost.title}-{cost.device}", comparisons.draw(cost)),
            }
            for cost in newest.values()
        ],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evidence", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["picture"] = _picture
    write_text(folder / PAGE, environment.get_template(PAGE).render(page=page))
    return folder / PAGE


def _section(chains: Sequence[ChainRecord], drawn: Callable[[str, Figure], str]) -> dict[str, Any]:
    """The results of one recipe's chains: tables, and figures as data URIs, empty if there is nothing to draw."""
    chains = sorted(chains, key=lambda chain: (chain.lmbda, chain.seed))
    recipe, best = chains[0].recipe, _fullest(chains)
    curves, found = rate_distortion.curves(chains), gains(chains)
    rated = [gain for gain in found if gain.rate_percent]
    here = [gain for gain in rated if gain.lmbda == best.lmbda]
    trained = [chain for chain in chains if chain is best or chain.seed == best.seed]
    return {
        "recipe": recipe,
        "facts": _facts(chains),
        "story": report_tables.story_table(chains),
        "quality": report_tables.quality_table(chains),
        "gains": report_tables.gains_table(found),  # without rows if no stage has a control
        "deltas": rate_distortion.deltas_table(curves, rate_distortion.controls(chains)),
        "gains_figure": drawn(f"{recipe}-gains", figures.gains(rated)) if rated else "",
        "frontier": drawn(f"{recipe}-frontier", figures.frontier(best, here)) if len(here) > 1 else "",
        "differing_images": rate_distortion.differing_images(chains),
        "curves": drawn(f"{recipe}-rate-distortion", figures.curves(curves, rate_distortion.all_on_kodak(chains))),
        "training": [
            (chain.title, drawn(f"{recipe}-training-{chain.folder.name}", figures.training(chain))) for chain in trained
        ],
        "compared_crops": compared_crops(best),
        "shown": best.title,
        "lineage": [(chain.title, node) for chain in chains for node in _lineage(chain, None)],
    }


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


def _lineage(chain: ChainRecord, parent: str | None) -> list[dict[str, Any]]:
    """The trees of published stages whose parent is `parent`: each stage with its children."""
    found = [stage.record for stage in chain.published.values() if stage.record.parent == parent]
    return [{"stage": record, "children": _lineage(chain, record.name)} for record in found]


def _drawn(folder: Path, name: str, figure: Figure) -> str:
    """A figure as a data URI. It is also saved as a PNG beside the page."""
    save(figure, folder / (re.sub(r"[^\w.-]+", "-", name) + ".png"))
    file = io.BytesIO()
    save(figure, file, "svg")
    return _data_uri(file, "svg+xml")


def _picture(pixels: np.ndarray) -> str:
    """Pixels (H, W, 3) in 8 bits as the data URI of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return _data_uri(file, "png")


def _data_uri(file: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
