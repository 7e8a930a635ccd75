"""Runs the exported programs of an HPCM codec with PyTorch alone. The caller does the entropy coding.

`hpcm export --torch` copies this file into the folder of programs as `runtime.py`, beside `coding_order.py`. Example:

    codec = ExportedCodec(Path("."))
    z, steps = codec.encode(image)  # (1, 3, H, W) in [0, 1]; sides multiples of codec.multiple, and at least twice that
    x_hat = codec.decode(z, lambda number, scales: steps[number].symbols)

An entropy coder codes z with the tables `quantized_cdf_z`, …, one for each channel. It codes each step of y with the
tables `quantized_cdf_y`, …, whose scales are in `scale_table`. All tables are in `codec.tables`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from coding_order import Step, to_rows, walk
from torch import Tensor


class CodedStep(NamedTuple):
    """The symbols of one coding step and the scales of their distributions, both (1, R, M/8)."""

    symbols: Tensor
    scales: Tensor


class ExportedCodec:
    """A codec made of exported programs. It is the context model of `coding_order.walk`."""

    def __init__(self, folder: Path):
        self.programs = {path.stem: torch.export.load(path).module() for path in folder.glob("*.pt2")}
        self.tables: dict[str, Tensor] = torch.load(folder / "tables.pt", weights_only=True)
        self.multiple: int = json.loads((folder / "codec.json").read_text())["multiple"]

    @torch.no_grad()
    def encode(self, image: Tensor) -> tuple[Tensor, list[CodedStep]]:
        """The symbols of an image (1, 3, H, W) in [0, 1]: those of z (1, N, h/4, w/4), and those of each step of y."""
        y = self.programs["g_a"](image)
        z = (self.programs["h_a"](y) - self.tables["means_hyper"]).round()
        rows, steps = to_rows(y, y.shape[1] // 8), []

        def code(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            symbols = (rows.index_select(1, step.rows) - means).round()
            steps.append(CodedStep(symbols, scales))
            return symbols + means

        walk(self, self._hyper(z), code)
        return z, steps

    @torch.no_grad()
    def decode(self, z: Tensor, read: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The image (1, 3, H, W). `read` maps the number of a step, 0 to 10, and its scales to the step's symbols."""
        y_hat = walk(self, self._hyper(z), lambda step, scales, means: read(step.number, scales) + means)
        return self.programs["g_s"](y_hat).clamp(0, 1)

    def _hyper(self, z: Tensor) -> Tensor:
        return self.programs["h_s"](z + self.tables["means_hyper"])

    def fuse(self, scale: int, context: Tensor) -> Tensor:
        """As `ContextModel` describes it."""
        return self.programs[f"fusion_s{scale + 1}"](context)

    def predict(self, step: Step, context: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """As `ContextModel` describes it."""
        return self.programs[f"step_s{step.scale + 1}"](context, y_hat, torch.tensor([step.number]))
