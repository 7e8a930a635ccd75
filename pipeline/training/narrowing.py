"""The initial weights of a child: transferred from its parent, then partly solved on calibration crops.

A module of the child may differ from the parent's only by a smaller inner width. It then keeps the parent's most useful
inner channels, and its last linear layer is solved again for the output of the wide module. Modules are narrowed in the
order of computation. Each is solved on the outputs of the modules narrowed before it.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from modules import HPCM
from modules.context.components import Component
from modules.layers.blocks import LinearLayer, Narrowable
from pipeline.data.crops import TrainingCrops
from pipeline.recipes.schema import Transfer
from pipeline.training.least_squares import (
    Moments,
    Solution,
    choose_channels,
    rows_of,
    set_layer,
    solve_fit,
    solve_part,
)
from pipeline.training.transfer import (
    Ledger,
    Origin,
    corresponding,
    ledger_of,
    new_components,
    tensors_to_copy,
    transfer_weights,
)
from pipeline.weights.checkpoints import codec_tensors

BATCH = 8
"""Calibration crops per batch."""
Crops = Sequence[Tensor]
"""Calibration images, each (B, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Site:
    """A module that was narrowed or fitted. `error` is the unexplained share of its target's variance."""

    name: str
    source: str
    error: float


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


def narrowable_pairs(parent: HPCM, child: HPCM) -> dict[str, str]:
    """Child's name → parent's name of the modules that differ only by a smaller inner width in the child."""
    ours, theirs = codec_tensors(child), codec_tensors(parent)
    pairs = {}
    for name, source in corresponding(parent, child).items():
        if ours[name].shape == theirs[source].shape:
            continue
        path = _narrowable_around(child, name)
        if path is not None:
            wide = source.removesuffix(name.removeprefix(path))
            wider, narrower = parent.get_submodule(wide), child.get_submodule(path)
            if type(wider) is type(narrower) and _inner(wider) > _inner(narrower):
                pairs[path] = wide
    return pairs


def narrow(parent: HPCM, child: HPCM, pairs: Mapping[str, str], crops: Crops) -> list[Site]:
    """Fill the child's narrow modules (`narrowable_pairs`) from the parent's. All others are transferred already."""
    if not pairs:
        return []
    narrow_forms = {path: child.get_submodule(path) for path in pairs}
    for path, source in pairs.items():
        child.set_submodule(path, parent.get_submodule(source))
    sites = []
    try:
        for path in _order_of_calls(child, pairs, crops):
            wide, narrower = child.get_submodule(path), narrow_forms[path]
            assert isinstance(wide, Narrowable)
            assert isinstance(narrower, Narrowable)
            last = wide.last_linear
            moments = _moments(child, last, crops)
            weight = last.weight.detach().cpu().flatten(1)
            bias = last.bias.detach().cpu() if last.bias is not None else weight.new_zeros(len(weight))
            index = choose_channels(weight, moments.covariance, _inner(narrower))
            solution = solve_part(weight, bias, moments, index)
            narrower.keep_channels(wide, index.to(next(narrower.parameters()).device))
            set_layer(narrower.last_linear, solution)
            child.set_submodule(path, narrower)
            sites.append(Site(path, pairs[path], solution.error))
    finally:
        for path, module in narrow_forms.items():
            child.set_submodule(path, module)
    return sites


def fit(parent: HPCM, child: HPCM, crops: Crops) -> list[Site]:
    """Solve the last linear layer of every new component for its predecessor's output on the predecessor's inputs.

    A component without such a layer does not change, nor does one whose predecessor has no weights, such as a slot
    without attention: the component starts as it exactly. On the `tiny` Baseline with narrow RWKV attention, the loss
    at step 0 was 0.0018 above the parent's. It was 0.0043 above when fitted on the component's inputs in the child, and
    0.0088 above without fitting.
    """
    sites = []
    for name in new_components(parent, child):
        component = child.get_submodule(name)
        layer = component.last_linear if isinstance(component, Component) else None
        if layer is not None and any(True for _ in parent.get_submodule(name).parameters()):
            solution = _fitted(parent, name, component, layer, crops)
            set_layer(layer, solution)
            path = next(path for path, module in component.named_modules() if module is layer)
            sites.append(Site(f"{name}.{path}", name, solution.error))
    return sites


def _fitted(parent: HPCM, name: str, component: nn.Module, layer: LinearLayer, crops: Crops) -> Solution:
    inputs = int(layer.weight.shape[1])
    moments = Moments(inputs + int(layer.weight.shape[0]))
    read: list[Tensor] = []

    def take(module: nn.Module, given: tuple[Tensor, ...], target: Tensor) -> None:
        component(*given)
        moments.add(torch.cat((rows_of(read.pop(), layer), target.movedim(1, -1).flatten(0, -2)), dim=1))

    predecessor = parent.get_submodule(name)
    with (
        layer.register_forward_pre_hook(lambda module, given: read.append(given[0])),
        predecessor.register_forward_hook(take),
    ):
        _run(parent, crops)
    return solve_fit(moments, inputs)


def _moments(model: HPCM, layer: LinearLayer, crops: Crops) -> Moments:
    """Moments of a layer's inputs over all its calls."""
    moments = Moments(layer.weight.shape[1])
    with layer.register_forward_hook(lambda module, given, output: moments.add(rows_of(given[0], layer))):
        _run(model, crops)
    return moments


def _order_of_calls(model: HPCM, paths: Iterable[str], crops: Crops) -> list[str]:
    """The modules in order of their first call."""
    order: dict[str, None] = {}
    with ExitStack() as hooks:
        for path in paths:
            note = partial(lambda path, *_: order.setdefault(path), path)
            hooks.enter_context(model.get_submodule(path).register_forward_hook(note))
        _run(model, crops[:1])
    return list(order)


@torch.no_grad()
def _run(model: HPCM, crops: Crops) -> None:
    for images in crops:
        model(images, training=False, reconstruct=False)


def _narrowable_around(model: nn.Module, name: str) -> str | None:
    """Path of the innermost narrowable module that contains a tensor."""
    path = name.rpartition(".")[0]
    while path and not isinstance(model.get_submodule(path), Narrowable):
        path = path.rpartition(".")[0]
    return path or None


def _inner(module: nn.Module) -> int:
    assert isinstance(module, Narrowable)
    return int(module.last_linear.weight.shape[1])
