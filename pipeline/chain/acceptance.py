"""Acceptance of a stage's result, compared with its parent."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.common.contracts import read_contract
from pipeline.common.files import FileError, write_json
from pipeline.recipes.schema import Accept
from pipeline.weights.published import Quality

REFUSAL = "refusal.json"


@dataclass(frozen=True)
class Refusal:
    """The qualities of a refused result and of its parent. They are stored in a file beside the training states."""

    quality: Quality
    parent: Quality

    def write(self, states: Path) -> None:
        """Write the file to the folder of the states. Raises FileError."""
        write_json(states / REFUSAL, asdict(self))


def refusal_reasons(states: Path, limits: Accept) -> list[str]:
    """Why the trained result in a folder of states was refused; empty if it was not, or if new limits allow it."""
    try:
        refusal = read_contract(Refusal, states / REFUSAL)
    except FileError:
        return []
    return judge(limits, refusal.quality, refusal.parent)


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
