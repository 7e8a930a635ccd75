"""Replays the forward and backward passes of a training step as a CUDA graph."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modules import Noise
from pipeline.common.errors import UserError

WARM_UP = 3
"""Runs before the capture, in which libraries allocate their workspaces and choose their kernels."""

Compute = Callable[[Tensor, Noise], dict[str, Tensor]]
"""Maps images and noise to the objective's values, and adds its gradients to those of the parameters."""


class GraphError(UserError):
    """A training step cannot be captured; the message names the setting to change."""


class GraphedGradients:
    """Computes the same as a `Compute`, with one launch on the GPU instead of one launch per kernel.

    A training step of a small codec launches thousands of kernels. Most take less time than their launch. The graph is
    captured in the first call, and all calls must have inputs of the same shapes on the GPU. The gradients stay in
    the same memory, so set them to zero, not to None.
    """

    def __init__(self, compute: Compute, parameters: Sequence[Tensor]):
        self._compute, self._parameters = compute, parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._values: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """The objective's values for these inputs. They are overwritten by the next call."""
        given = (images, *noise)
        if self._graph is None:
            self._graph = self._capture(given)
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return self._values

    def _capture(self, given: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        device = given[0].device
        self._inputs = tuple(tensor.clone() for tensor in given)
        images, *noise = self._inputs
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._compute(images, Noise(*noise))
        torch.cuda.current_stream(device).wait_stream(stream)
        # On the stream of the warm-up, because autograd accumulates gradients on the stream of their first use.
        # Threads that pin batches, or watch other processes, may allocate and ask for events during the capture.
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._values = self._compute(images, Noise(*noise))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch has no class of its own for a failed capture.
            raise GraphError(
                f"the training step cannot be captured as a CUDA graph: {str(error).strip().splitlines()[0]}\n"
                "  An objective or metric that waits for a value from the GPU cannot be captured. Train with "
                "--set cuda_graph=false."
            ) from error
        for parameter in self._parameters:  # The warm-up has added gradients.
            if parameter.grad is not None:
                parameter.grad.zero_()
        return graph
