"""Replays the networks between the coding steps as CUDA graphs, which are captured for each size of latent.

The networks of the steps launch a thousand kernels or more. Each step waits for the symbols of the one before, so a GPU
cannot hide the launches. A graph has one launch. `code` runs as usual between two graphs, so symbols and all other data
of a file are never a part of a graph.
"""

import logging
import threading
from contextlib import suppress
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, cuda

from modules.context.coding_order import CodeStep, Step, hierarchy
from modules.network import HPCMNetwork

_logger = logging.getLogger(__name__)

DEVICE = "cuda"
"""The type of device that has graphs."""

MOST_POSITIONS = 2**14
"""Graphs are kept for latents of so many positions in all, those of 4.2 million pixels. This bounds their memory.

Activations of so many positions take 0.8 GB (`base`, recipe `evidence`). A larger latent is coded without graphs. In
training, launches took 2.5 times as long as kernels for 1 million pixels, so they should take less time for 4 million.
"""

CHECKS = 2
"""So many images of a size are computed both with and without graphs, before images are computed with graphs alone."""

Addresses = list[tuple[int, torch.dtype, tuple[int, ...]]]
Key = tuple[torch.Size, torch.dtype, bool]
"""What graphs depend on besides weights: shape and type of ẑ, and the network's mode."""

_lock = threading.Lock()
"""Held by the one thread that captures or replays graphs. Graphs share their static tensors and libraries' memory."""


def walk(network: HPCMNetwork, z_hat: Tensor, code: CodeStep) -> Tensor:
    """What `network.walk` returns for one image.

    On a GPU the second image of a size captures graphs. It and the third are computed both with and without them, and
    later ones with graphs alone. If the capture fails, or if graphs compute other bits, a warning says so, and
    `network.cuda_graphs` becomes False.
    """
    wanted = network.cuda_graphs and z_hat.device.type == DEVICE and _positions(z_hat) <= MOST_POSITIONS
    if not wanted or torch.is_grad_enabled() or not _lock.acquire(blocking=False):
        return network.walk(z_hat, code)
    try:
        addresses = _addresses(network)
        graphs = _graphs.get(network)
        if graphs is None or graphs.addresses != addresses:
            graphs = _graphs[network] = _Graphs(addresses)
        return graphs.walk(network, z_hat, code)
    finally:
        _lock.release()


def _positions(z_hat: Tensor) -> int:
    return 16 * z_hat.shape[2] * z_hat.shape[3]


def _addresses(network: HPCMNetwork) -> Addresses:
    """Where and how the weights are stored. Graphs read them there, so they see values that are changed in place."""
    tensors = (t for module in network.modules() for t in (*module._parameters.values(), *module._buffers.values()))
    return [(t.data_ptr(), t.dtype, t.stride()) for t in tensors if t is not None]


class _Graphs:
    """The graphs of a network, valid while its weights stay where they are."""

    def __init__(self, addresses: Addresses):
        self.addresses = addresses
        self.seen: set[Key] = set()
        self.walks: dict[Key, _GraphedWalk] = {}
        """The least recently used come first."""

    def walk(self, network: HPCMNetwork, z_hat: Tensor, code: CodeStep) -> Tensor:
        """Replay the graphs of this size, unless this is one of its first images."""
        key = z_hat.shape, z_hat.dtype, network.training
        graphed = self.walks.pop(key, None)
        if graphed is not None and graphed.checks == CHECKS:
            self.walks[key] = graphed
            return graphed(network, z_hat, code)
        record = _Record(code)
        y_hat = network.walk(z_hat, record)
        if key in self.seen:
            try:
                graphed = graphed or self._captured(network, z_hat)
                if not torch.equal(graphed(network, z_hat, record.compare), y_hat) or record.differs:
                    raise RuntimeError("they do not compute the same bits as single launches")
                graphed.checks += 1
                self.walks[key] = graphed
            except RuntimeError as error:  # PyTorch has no class of its own for a failed capture.
                network.cuda_graphs = False
                self.walks.clear()
                _logger.warning("coding without CUDA graphs from now on: %s", str(error).strip().partition("\n")[0])
        self.seen.add(key)
        return y_hat

    def _captured(self, network: HPCMNetwork, z_hat: Tensor) -> "_GraphedWalk":
        """Capture graphs. If there would be too many positions, they replace the least recently used ones."""
        while sum(_positions(z) for z in (z_hat, *(other.z_hat for other in self.walks.values()))) > MOST_POSITIONS:
            del self.walks[next(iter(self.walks))]
        height, width = z_hat.shape[2:]
        _logger.info("capturing the coding steps as CUDA graphs, for latents of %d × %d", 4 * height, 4 * width)
        return _GraphedWalk(network, z_hat)


class _Record:
    """Codes steps with `code`, and then tells whether graphs compute the same from the same symbols."""

    def __init__(self, code: CodeStep):
        self.code, self.differs = code, False
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """What `code` returns."""
        y_rows = self.code(step, scales, means)
        self.steps.append((scales, means, y_rows))
        return y_rows

    def compare(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """What `code` returned for this step."""
        *expected, y_rows = self.steps[step.number]
        self.differs |= not all(map(torch.equal, expected, (scales, means)))
        return y_rows


class _GraphedWalk:
    """The walk for one size, in twelve graphs. They share memory, so they are replayed in this order only."""

    def __init__(self, network: HPCMNetwork, z_hat: Tensor):
        """Capture. Raises RuntimeError if a part of the network cannot be captured."""
        device, self.checks = z_hat.device, 0
        self._pool, self._graphs = cuda.graph_pool_handle(), list[cuda.CUDAGraph]()
        self._steps: list[tuple[Step, Tensor, Tensor, Tensor]] = []
        # The cache of coding orders may drop this one, which the graphs read.
        self._read = hierarchy(4 * z_hat.shape[2], 4 * z_hat.shape[3], device)
        # Graphs may later be used outside of inference mode, where its tensors cannot be changed.
        with torch.inference_mode(False), torch.no_grad():
            self.z_hat = z_hat.clone()
            several = network.rate_vectors is not None
            self._quality = torch.full((1,), float(network.quality), device=device) if several else None
            cuda.synchronize(device)
            with cuda.stream(_stream(device)), network.at_quality(self._quality):
                # Libraries allocate their memory and load their kernels before the capture.
                network.walk(self.z_hat, lambda step, scales, means: means)
                try:
                    self._begin()
                    self._y_hat = network.walk(self.z_hat, self._next)
                    self._graphs[-1].capture_end()
                except BaseException:
                    self._abandon(device)
                    raise

    def _begin(self) -> None:
        self._graphs.append(cuda.CUDAGraph())
        # Other threads may allocate memory during the capture.
        self._graphs[-1].capture_begin(self._pool, capture_error_mode="thread_local")

    def _next(self, step: Step, scales: Tensor, means: Tensor) -> Tensor:
        """End the graph that computes a step's scales and means. The next one reads ŷ from the tensor returned."""
        y_rows = torch.empty_like(means)
        self._steps.append((step, scales, means, y_rows))
        self._graphs[-1].capture_end()
        self._begin()
        return y_rows

    def _abandon(self, device: torch.device) -> None:
        """End a capture that has failed. PyTorch's allocator and random numbers would go on as during a capture."""
        with suppress(RuntimeError):
            self._graphs[-1].capture_end()
        with suppress(RuntimeError):  # This capture has ended as usual, and another operation has failed.
            cuda.memory._cuda_endAllocateToPool(device.index, self._pool)
        generator = cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())

    def __call__(self, network: HPCMNetwork, z_hat: Tensor, code: CodeStep) -> Tensor:
        """Replay, for ẑ and the network's quality."""
        self.z_hat.copy_(z_hat)
        if self._quality is not None:
            self._quality.fill_(float(network.quality))
        first, *others = self._graphs
        first.replay()
        for graph, (step, scales, means, y_rows) in zip(others, self._steps, strict=True):
            y_rows.copy_(code(step, scales.clone(), means))
            graph.replay()
        y_hat = self._y_hat.clone()
        cuda.current_stream(y_hat.device).synchronize()  # The next thread may use another stream.
        return y_hat


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> cuda.Stream:
    """One stream for all captures on a device, because libraries keep memory for each stream."""
    return cuda.Stream(device)


_graphs: WeakKeyDictionary[HPCMNetwork, _Graphs] = WeakKeyDictionary()
