"""Codes a step without coding it: rounds the residual, and keeps what its likelihood needs."""

import torch
from torch import Tensor

from modules.compressai_parts import quantize_ste
from modules.context.coding_order import Step


class Estimator:
    """Rounds each step's residual. Keeps the residual and its scales for the likelihoods."""

    def __init__(self, y_rows: Tensor, training: bool):
        self.y_rows, self.round = y_rows, quantize_ste if training else torch.round
        self.residuals: list[Tensor] = []
        self.scales: list[Tensor] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """Round the step's rows, (B, R, M/8); returns ŷ of these rows."""
        residual = self.y_rows.index_select(1, step.rows) - means
        self.residuals.append(residual)
        self.scales.append(scales)
        rounded: Tensor = self.round(residual)
        return rounded + means

    def collected(self, restore: Tensor) -> tuple[Tensor, Tensor]:
        """Residuals (before rounding) and scales of all steps as rows of y."""
        residuals, scales = (torch.cat(rows, dim=1).index_select(1, restore) for rows in (self.residuals, self.scales))
        return residuals, scales
