"""The gradients of a training step: micro-batches, handover and CUDA graph."""

from collections.abc import Sequence

from accelerate import Accelerator
from torch import Tensor

from modules import Noise
from modules.context.coding_order import hierarchy
from pipeline.recipes.schema import Segment, Stage
from pipeline.training.cuda_graph import Compute, GraphedGradients
from pipeline.training.objectives import Handover, build_objective
from pipeline.training.transfer import Migration


class Gradients:
    """Computes the gradients of a segment's objective, until `end` is called.

    Create it after `requires_grad` is set for the child. `parameters` are the trainable ones.
    """

    def __init__(
        self,
        stage: Stage,
        segment: Segment,
        migration: Migration,
        parameters: Sequence[Tensor],
        accelerator: Accelerator,
    ):
        self.segment, self.migration, self.accelerator = segment, migration, accelerator
        self.parts, self._parameters = stage.data.accumulate, parameters
        self._handover: Handover | None = None
        child = migration.child
        if migration.parent is not None:
            migration.parent.requires_grad_(False).to(accelerator.device)
        objective = build_objective(segment.objective, migration, stage)
        if stage.compile:
            objective.compile()
        # For evaluation, Accelerate adds autocast alone. DDP would exchange gradients within the backward pass.
        self._objective = accelerator.prepare_model(objective, evaluation_mode=True)
        wanted = stage.cuda_graph and accelerator.device.type == "cuda"
        self.not_graphed = reason_against_graph(stage) if wanted else ""
        """Why no CUDA graph computes the gradients, although the stage asks for one on a GPU; otherwise empty."""
        self.graphed = wanted and not self.not_graphed
        """Whether a CUDA graph computes the gradients. Before each call they must be zero; otherwise, None will do."""
        # A graph reads the coding order where it was at the capture. Images of many sizes may drop it from its cache.
        crop = child.latent_shapes(stage.data.crop, stage.data.crop)[0][1:]
        self._read_by_graph = hierarchy(*crop, child.means_hyper.device) if self.graphed else None
        self._compute = self._computation()

    def __call__(self, step: int, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Add this process's gradients of a step of the segment. Returns the means of the objective's values.

        `images` (B, 3, H, W) and `noise` are those of this process.
        """
        if step < self.segment.handover:
            self._blend(step / self.segment.handover)
        means: dict[str, Tensor] = {}
        for crops, *drawn in zip(*(tensor.chunk(self.parts) for tensor in (images, *noise)), strict=True):
            inputs = [tensor.to(self.accelerator.device, non_blocking=True) for tensor in (crops, *drawn)]
            values = self._compute(inputs[0], Noise(*inputs[1:]))
            for name, value in values.items():
                means[name] = means.get(name, 0) + value / self.parts
        if step + 1 >= self.segment.handover:
            self._end_handover()
        return means

    def end(self) -> None:
        """Take the parent's components out of the child, and release memory."""
        self._end_handover()
        self.accelerator.free_memory()

    def _blend(self, share: float) -> None:
        """Set the share of the child's components in their outputs; the parent's have the rest."""
        if self._handover is None:
            assert self.migration.parent is not None  # checked by the recipe's schema
            self._handover = Handover(self.migration.child, self.migration.parent, self.migration.components)
        self._handover.share.fill_(share)

    def _end_handover(self) -> None:
        if self._handover is not None:
            self._handover.end()
            self._handover = None
            self._compute = self._computation()  # A graph with the parent's components is of no more use.

    def _computation(self) -> Compute:
        return GraphedGradients(self._backward, self._parameters) if self.graphed else self._backward

    def _backward(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch's share of the loss. Returns the objective's values."""
        values = self._objective(images, noise)
        self.accelerator.backward(values["loss"] / self.parts)
        return {name: value.detach() for name, value in values.items()}


def reason_against_graph(stage: Stage) -> str:
    """Why the training steps of a stage cannot be captured as a CUDA graph; empty if they can."""
    if stage.compile:
        return "torch.compile launches the kernels"
    if stage.metric != "mse":
        return f"the gradient of the metric {stage.metric} may wait for a value from the GPU"
    return ""
