"""A stand-in for `torch.cuda` on the CPU that captures and replays graphs, with the limits of CUDA's graphs.

A graph is the list of the operators that ran during its capture. A replay runs them again in the same memory, so what
was a number of Python in the capture is still that number. Memory that was allocated outside of captures must still be
there. Operators for which the processor would wait for the GPU, or the GPU for a number from the processor, raise
RuntimeError.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

REFUSED = {"_local_scalar_dense", "equal", "is_nonzero", "item", "lift_fresh", "masked_select", "nonzero"}


STATE = {"random numbers": "usual", "allocator": "usual"}
"""Whether parts of PyTorch are in the state of a capture."""


class Outside(NamedTuple):
    """A tensor in memory that no capture allocated. It does not keep the memory."""

    storage: StorageWeakRef
    layout: tuple[int, torch.Size, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Outside":
        return cls(StorageWeakRef(x.untyped_storage()), (x.storage_offset(), x.shape, x.stride()), x.dtype)

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "a graph reads memory that has been freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Call(NamedTuple):
    """A call of an operator. The results are empty if it changes its arguments."""

    operator: Callable[..., Any]
    arguments: list[Any]
    structure: TreeSpec
    results: list[Tensor]


class CUDAGraph(TorchDispatchMode):
    """The calls of one capture."""

    def capture_begin(self, pool: set[int], capture_error_mode: str) -> None:
        """The pool tells which memory captures have allocated."""
        self.pool, self.calls, self.failed = pool, list[Call](), False
        STATE.update(dict.fromkeys(STATE, "capturing"))
        self.__enter__()

    def capture_end(self) -> None:
        """A capture computes nothing, so the values are not those that the operators gave."""
        self.__exit__(None, None, None)
        if self.failed:
            raise RuntimeError("operation failed due to a previous error during capture")
        STATE.update(dict.fromkeys(STATE, "usual"))
        for call in self.calls:
            for tensor in call.results:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        if name in REFUSED or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.failed = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}\nA second line.")
        kwargs = kwargs or {}
        given = operator(*args, **kwargs)
        if not operator.is_view:  # A view stays as it is.
            arguments, structure = tree_flatten((args, kwargs))
            outside = [isinstance(x, Tensor) and _memory(x) not in self.pool for x in arguments]
            held = [Outside.of(x) if out else x for x, out in zip(arguments, outside, strict=True)]
            results = [] if operator._schema.is_mutable else tree_leaves(given)
            self.calls.append(Call(operator, held, structure, results))
            self.pool.update(map(_memory, results))
        return given

    def replay(self) -> None:
        for operator, held, structure, results in self.calls:
            arguments = [x.tensor() if isinstance(x, Outside) else x for x in held]
            args, kwargs = tree_unflatten(arguments, structure)
            values = tree_leaves(operator(*args, **kwargs))
            for result, value in zip(results, values, strict=bool(results)):
                result.copy_(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Stream:
    """Nothing: the CPU computes in order."""

    def __init__(self, device: torch.device):
        self.device = device

    def synchronize(self) -> None:
        pass


class Generator:
    """The generator of random numbers, which a capture that fails leaves in the state of a capture."""

    clone_state = object

    def graphsafe_set_state(self, state: object) -> None:
        STATE["random numbers"] = "usual"


class Memory:
    """The allocator, which a capture that fails leaves in the state of a capture."""

    @staticmethod
    def _cuda_endAllocateToPool(device: int | None, pool: set[int]) -> None:
        STATE["allocator"] = "usual"


class EmulatedCuda:
    """What `modules.bitstream.graphs` uses of `torch.cuda`."""

    CUDAGraph, Stream, current_stream, graph_pool_handle = CUDAGraph, Stream, Stream, set
    default_generators, memory = {None: Generator()}, Memory

    @staticmethod
    def stream(stream: Stream) -> nullcontext[None]:
        return nullcontext()

    @staticmethod
    def synchronize(device: torch.device) -> None:
        pass
