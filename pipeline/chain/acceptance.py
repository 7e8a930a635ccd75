"""Acceptance of a stage's result, compared with its parent."""

from pipeline.recipes.schema import Accept
from pipeline.weights.published import Quality


def judge(limits: Accept, quality: Quality, parent: Quality | None) -> list[str]:
    """The limits that a result exceeds, one phrase each. A result without parent exceeds none."""
    if parent is None:
        return []
    measured = {
        "bpp_change": quality.bpp / parent.bpp - 1,
        "psnr_drop": parent.psnr_db - quality.psnr_db,
        "rd_loss_change": quality.rd_loss / parent.rd_loss - 1,
    }
    allowed = limits.model_dump()
    return [
        f"{name} is {value:+.4f}, allowed {allowed[name]:+.4f}"
        for name, value in measured.items()
        if allowed[name] is not None and not value <= allowed[name]  # NaN exceeds every limit.
    ]
