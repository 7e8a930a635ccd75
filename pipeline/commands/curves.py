"""The curves of a sweep, once its chains are built."""

from pipeline.chain.lambda_sweep import Sweep
from pipeline.commands.display import console, show
from pipeline.common.figure_style import save
from pipeline.evidence import rate_distortion
from pipeline.tracking.records import Records


def draw_curves(sweep: Sweep) -> None:
    """Print the points and the differences between the curves, and draw them beside the chains."""
    records = Records(sweep.runs)
    wanted = {(chain.recipe, chain.lmbda, chain.seed): chain for point in sweep.points() for chain in point.chains}
    found = [chain for chain in records.published_chains() if (chain.recipe, chain.lmbda, chain.seed) in wanted]
    curves = rate_distortion.curves(found)
    show(
        rate_distortion.points_table("Real bitstreams of whole validation images", curves),
        rate_distortion.deltas_table(curves, rate_distortion.references(found), rate_distortion.uncontrolled(found)),
    )
    path = next(iter(wanted.values())).folder.parent / "rate-distortion.png"
    save(rate_distortion.draw(curves, rate_distortion.all_on_kodak(records, found)), path)
    console.print(f"curves: {path}", soft_wrap=True)
