"""Exports a codec's networks as `torch.export` programs, and as ONNX if `torch.onnx` accepts them.

A folder of programs runs with PyTorch alone. Its `runtime.py` runs the coding steps, without the entropy coding. A
program takes one image, whose sides are multiples of the codec's padding and at least twice the padding.
"""

import shutil
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, save

from modules import HPCM
from modules.biwkv4.decomposed import biwkv4_decomposed
from modules.context import coding_order
from pipeline.common.files import replacing, write_json
from pipeline.weights.checkpoints import CheckpointError, load_codec

BIWKV4 = torch.ops.hpcm.biwkv4.default
LARGEST_SIDE = 2**13
"""Longest side of an image in pixels that a program takes."""

_SCALES = coding_order.hierarchy(8, 8, torch.device("cpu")).scales


class ContextStep(nn.Module):
    """The context model of one scale: predicts the scales and means of a step, and the context of the next."""

    def __init__(self, model: HPCM, scale: int):
        super().__init__()
        adaptors, self.prior, self.attention = model.scale_components(scale)
        steps = [step for step in _SCALES[scale].steps if step.adaptor is not None]
        ordered = [cast(nn.Conv2d, adaptors[cast(int, step.adaptor)]) for step in steps]
        self.first = steps[0].number
        self.weights = nn.Parameter(torch.stack([adaptor.weight for adaptor in ordered]))
        self.biases = nn.Parameter(torch.stack([cast(Tensor, adaptor.bias) for adaptor in ordered]))
        self.adaptive = nn.Parameter(torch.cat([model.adaptive_params_list[step.number - 1] for step in steps]))

    def forward(self, context: Tensor, y_hat: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and means of step `number` (1,), 1 to 10, and the next context, both (1, 2M, h, w).

        `context` is (1, 2M, h, w), `y_hat` (1, M, h, w).
        """
        place = number - self.first
        weight, bias, q = (x.index_select(0, place) for x in (self.weights, self.biases, self.adaptive))
        adapted = nn.functional.conv2d(torch.cat((context, y_hat), dim=1), weight[0], bias[0])
        parameters = self.prior(adapted, q)
        return parameters, self.attention(parameters, context)


@dataclass(frozen=True)
class Network:
    """A network to export, with example inputs and the sizes that each input may have."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    multiples: tuple[int | None, ...]
    """For each input, the number of which its sides are multiples; None for an input of fixed shape."""


def networks(model: HPCM) -> dict[str, Network]:
    """The networks of a codec in evaluation mode, by the name of their program."""
    M, N, factor = model.config.M, model.config.N, model.downsampling_factor
    found = {
        "g_a": _network(model.g_a, (3, factor)),
        "h_a": _network(model.h_a, (M, factor // 16)),
        "h_s": _network(model.h_s, (N, factor // 64)),
        "g_s": _network(model.g_s, (M, factor // 16)),
    }
    for scale in range(3):
        multiple = factor // 64 << scale
        step = ContextStep(model, scale)
        found[f"step_s{scale + 1}"] = _network(step, (2 * M, multiple), (M, multiple), number=step.first)
        if scale:
            found[f"fusion_s{scale + 1}"] = _network(model.context_net[scale - 1], (2 * M, multiple))
    return found


def program(network: Network, keep_op: bool = False) -> ExportedProgram:
    """A network as a program. With `keep_op` it calls `hpcm::biwkv4`, which `modules.biwkv4.op` registers."""
    # At least 2, because the tracer treats a single row of attention windows as a case that needs another program.
    h, w = (Dim(side, min=2, max=LARGEST_SIDE // 128) for side in "hw")
    shapes = tuple({2: m * h, 3: m * w} if m else None for m in network.multiples)
    with torch.no_grad():
        found = export(network.module, network.inputs, dynamic_shapes=shapes)
        if not keep_op and any(node.target is BIWKV4 for node in found.graph.nodes):
            found = found.run_decompositions({BIWKV4: biwkv4_decomposed})
    return found


def export_programs(source: Path, folder: Path, keep_op: bool = False) -> None:
    """Write a checkpoint's programs and their runtime into a new or empty folder. Raises CheckpointError."""
    model = _prepared(source, folder)
    with warnings.catch_warnings():
        # PyTorch warns that it shares the memory of tensors, which no user can change.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        for name, network in networks(model).items():
            save(program(network, keep_op), folder / f"{name}.pt2")
    _write_companions(model, folder)


def export_onnx(source: Path, folder: Path) -> dict[str, str]:
    """Write a checkpoint's networks as ONNX. Returns for each the reason why `torch.onnx` refused it, or "".

    Raises CheckpointError, also if a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise CheckpointError(f"ONNX needs {' and '.join(missing)}: run pip install 'hpcm-rwkv[onnx]'")
    model = _prepared(source, folder)
    outcomes = {}
    for name, network in networks(model).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(program(network), f=folder / f"{name}.onnx", external_data=False, verbose=False)
            outcomes[name] = ""
        except Exception as error:  # torch.onnx and onnxscript raise many types.
            outcomes[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    _write_companions(model, folder)
    return outcomes


def _prepared(source: Path, folder: Path) -> HPCM:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists; give a new or an empty folder")
    model = load_codec(source)
    if model.config.rates:
        raise CheckpointError(f"{source}: a codec of several rates; the programs code at one rate only")
    folder.mkdir(parents=True, exist_ok=True)
    return model


def _write_companions(model: HPCM, folder: Path) -> None:
    """Write the other files that a runtime needs: order of coding, coding tables, sizes."""
    shutil.copyfile(Path(__file__).with_name("exported_runtime.py"), folder / "runtime.py")
    shutil.copyfile(coding_order.__file__, folder / "coding_order.py")
    names = ("means_hyper", "scales_hyper", *HPCM.coding_table_names())
    with replacing(folder / "tables.pt") as partial:
        torch.save({name: getattr(model, name).detach().clone() for name in names}, partial)
    sizes = {"M": model.config.M, "N": model.config.N, "multiple": model.downsampling_factor}
    write_json(folder / "codec.json", {**sizes, "config": model.config.to_dict()})


def _network(module: nn.Module, *sizes: tuple[int, int], number: int | None = None) -> Network:
    inputs: list[Tensor] = [torch.rand(1, channels, 2 * multiple, 3 * multiple) for channels, multiple in sizes]
    multiples: list[int | None] = [multiple for _, multiple in sizes]
    if number is not None:
        inputs.append(torch.tensor([number]))
        multiples.append(None)
    return Network(module, tuple(inputs), tuple(multiples))
