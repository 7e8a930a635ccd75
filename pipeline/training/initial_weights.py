"""The initial weights of a child: transferred from its parent, then partly solved on calibration crops."""

from dataclasses import dataclass

import torch

from modules import HPCM
from pipeline.data.crops import TrainingCrops
from pipeline.recipes.schema import Transfer
from pipeline.training.narrowing import Crops, Site, fit, narrow, narrowable_pairs
from pipeline.training.transfer import Ledger, Origin, ledger_of, tensors_to_copy, transfer_weights
from pipeline.weights.checkpoints import codec_tensors

BATCH = 8
"""Calibration crops per batch."""


@dataclass(frozen=True)
class InitialWeights:
    """The ledger of a child, and the modules that were narrowed and fitted."""

    ledger: Ledger
    narrowed: tuple[Site, ...] = ()
    fitted: tuple[Site, ...] = ()


def start_child(parent: HPCM, child: HPCM, rules: Transfer, crops: TrainingCrops) -> InitialWeights:
    """Fill `child` from `parent` in place; both must be on one device. Raises TransferError.

    Layers are solved only with `initialization: function-preserving`. The calibration crops are the first
    `rules.calibration` of `crops`, so they depend only on the seed and the data.
    """
    transferred = transfer_weights(parent, child, rules)
    to_narrow = narrowable_pairs(parent, child) if rules.narrow else {}
    if rules.initialization != "function-preserving" or not (to_narrow or rules.fit):
        return InitialWeights(transferred)
    child.eval()
    parent.eval()
    batches = _batches(crops, rules.calibration, child.means_hyper.device)
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
    return InitialWeights(ledger_of(parent, child, sources, solved), tuple(narrowed), tuple(fitted))


def _batches(crops: TrainingCrops, count: int, device: torch.device) -> Crops:
    images = [crops[n]["image"] for n in range(count)]
    return [torch.stack(images[first : first + BATCH]).to(device) for first in range(0, count, BATCH)]
