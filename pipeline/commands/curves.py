"""The curves of a sweep, once its chains are built."""

from pipeline.chain.lambda_sweep import Points
from pipeline.commands.display import console, show
from pipeline.common.figure_style import save
from pipeline.evidence import figures, rate_distortion
from pipeline.records.chains import RecordsError, read_chain


def draw_curves(points: Points) -> None:
    """Print the points and the differences between the curves, and draw them beside the chains.

    Raises RecordsError, after the points, if they were measured on different images.
    """
    folders = dict.fromkeys(chain.folder for chains in points.values() for chain in chains)
    found = [read_chain(folder) for folder in folders]
    curves = rate_distortion.curves(found)
    show(rate_distortion.points_table("Real bitstreams of whole validation images", curves))
    if problem := rate_distortion.differing_images(found):
        raise RecordsError(problem)
    deltas = rate_distortion.deltas_table(curves, rate_distortion.controls(found))
    if deltas.rows:
        show(deltas)
    else:
        console.print(f"no Bjøntegaard deltas: {rate_distortion.NO_CONTROL}")
    path = next(iter(folders)).parent / "rate-distortion.png"
    save(figures.curves(curves, rate_distortion.all_on_kodak(found)), path)
    console.print(f"curves: {path}")
