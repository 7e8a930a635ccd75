"""Runs the exported programs of an HPCM codec with PyTorch alone. The caller does the entropy coding.

`hpcm export --torch` copies this file into the folder of programs as `runtime.py`, beside `hierarchy.py`. Example:

    codec = ExportedCodec(Path("."))
    coded = codec.encode(image)  # (1, 3, H, W) in [0, 1]; H and W multiples of codec.multiple, and at least twice that
    x_hat = codec.decode(coded.z, lambda number, scales: coded.y[number].symbols)

An entropy coder codes z with the tables `quantized_cdf_z`, …, one for each channel. It codes each step of y with the
tables `quantized_cdf_y`, …, whose scales are in `scale_table`. All tables are in `codec.tables`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hierarchy import from_rows, hierarchy, to_rows
from torch import Tensor


@dataclass(frozen=True)
class CodedStep:
    """The symbols of one coding step and the scales of their distributions, both (1, R, M/8)."""

    symbols: Tensor
    scales: Tensor


@dataclass(frozen=True)
class CodedLatents:
    """The symbols that an entropy coder writes: those of z (1, N, h/4, w/4), then those of y, step by step."""

    z: Tensor
    y: tuple[CodedStep, ...]


class ExportedCodec:
    """A codec made of exported programs."""

    def __init__(self, folder: Path):
        self.programs = {path.stem: torch.export.load(path).module() for path in folder.glob("*.pt2")}
        facts = json.loads((folder / "codec.json").read_text())
        self.tables: dict[str, Tensor] = torch.load(folder / "tables.pt", weights_only=True)
        self.eighth, self.multiple = facts["M"] // 8, facts["multiple"]

    @torch.no_grad()
    def encode(self, image: Tensor) -> CodedLatents:
        """The symbols of an image (1, 3, H, W) in [0, 1]."""
        y = self.programs["g_a"](image)
        z = (self.programs["h_a"](y) - self.tables["means_hyper"]).round()
        rows, steps = to_rows(y, self.eighth), []

        def code(step, scales: Tensor, means: Tensor) -> Tensor:
            symbols = (rows.index_select(1, step.rows) - means).round()
            steps.append(CodedStep(symbols, scales))
            return symbols + means

        self._walk(z, code)
        return CodedLatents(z, tuple(steps))

    @torch.no_grad()
    def decode(self, z: Tensor, read: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The image (1, 3, H, W). `read` maps the number of a step, 0 to 10, and its scales to the step's symbols."""
        number = iter(range(11))
        y_hat = self._walk(z, lambda step, scales, means: read(next(number), scales) + means)
        return self.programs["g_s"](y_hat).clamp(0, 1)

    def _walk(self, z: Tensor, code: Callable[..., Tensor]) -> Tensor:
        hyper = self.programs["h_s"](z + self.tables["means_hyper"])
        hyper_rows = to_rows(hyper, self.eighth)
        context_rows = y_rows = hyper_rows[:, :0]
        for number, scale in enumerate(hierarchy(*hyper.shape[2:], hyper.device).scales, start=1):
            size = scale.height, scale.width
            context = from_rows(torch.cat((context_rows, hyper_rows), dim=1).index_select(1, scale.context), *size)
            if number > 1:
                context = self.programs[f"fusion_s{number}"](context)
            empty = hyper.new_zeros(1, size[0] * size[1] * 8, self.eighth)
            y_rows = empty.index_copy(1, scale.coarser, y_rows)
            parameters, steps = context, 0
            for step in scale.steps:
                if step.adaptor is not None:
                    y_hat = from_rows(y_rows, *size)
                    parameters, context = self.programs[f"step_s{number}"](context, y_hat, torch.tensor([steps]))
                    steps += 1
                scales, means = to_rows(parameters, self.eighth).index_select(1, step.parameters).chunk(2, dim=1)
                y_rows = y_rows.index_copy(1, step.local, code(step, scales, means))
            context_rows = to_rows(context, self.eighth)
        return from_rows(y_rows, *size)
