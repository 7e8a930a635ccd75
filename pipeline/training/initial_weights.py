"""The initial weights of a child: transferred from its parent, then partly solved on calibration crops."""

import torch

from modules import HPCM
from pipeline.data.crops import TrainingCrops
from pipeline.recipes.schema import Transfer
from pipeline.training.narrowing import Site, fit, narrow, narrowable_pairs
from pipeline.training.transfer import Ledger, Origin, ledger_of, tensors_to_copy, transfer_weights
from pipeline.weights.checkpoints import codec_tensors

BATCH = 8
"""Calibration crops per batch."""


def start_child(
    parent: HPCM, child: HPCM, rules: Transfer, crops: TrainingCrops
) -> tuple[Ledger, dict[Origin, list[Site]]]:
    """Fill `child` from `parent` in place; both must be on one device. Raises TransferError.

    Returns the ledger, and the modules that were narrowed and fitted. They are solved only with `initialization:
    function-preserving`. The calibration crops are the first `rules.calibration` of `crops`, so they depend only on the
    seed and the data.
    """
    transferred = transfer_weights(parent, child, rules)
    to_narrow = narrowable_pairs(parent, child) if rules.narrow else {}
    if rules.initialization != "function-preserving" or not (to_narrow or rules.fit):
        return transferred, {}
    child.eval()
    parent.eval()
    images = [crops[n]["image"] for n in range(rules.calibration)]
    starts, device = range(0, len(images), BATCH), child.means_hyper.device
    batches = [torch.stack(images[first : first + BATCH]).to(device) for first in starts]
    narrowed = narrow(parent, child, to_narrow, batches)
    fitted = fit(parent, child, batches) if rules.fit else []
    solved: dict[str, tuple[Origin, str | None]] = {}
    for name in codec_tensors(child):
        for site in narrowed:
            if name.startswith(f"{site.name}."):
                solved[name] = "narrowed", site.source + name.removeprefix(site.name)
        if any(name.startswith(f"{site.name}.") for site in fitted):
            solved[name] = "fitted", None
    sources = {name: s for name, s in tensors_to_copy(parent, child, rules).items() if name not in solved}
    return ledger_of(parent, child, sources, solved), {"narrowed": narrowed, "fitted": fitted}
