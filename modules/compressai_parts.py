"""The parts of CompressAI that the codec uses, without the packages that only its other parts need.

`import compressai` imports data sets of point clouds, and with them torch_geometric and PyTorch's compiler. This takes
3 to 4 s, more than PyTorch itself takes. Here the code of CompressAI's packages runs later: when a name is used that is
not imported yet. `compressai.zoo` and `import compressai.datasets` work as usual. Nothing is left out or replaced.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any


def import_on_demand(name: str) -> ModuleType:
    """Put a package into `sys.modules`. Its code runs on the first use of a name that it does not have yet.

    Its submodules can be imported before that. Does nothing if the package is already imported.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module, loader, lock, started = module_from_spec(spec), spec.loader, RLock(), False

    def run_then_get(attribute: str) -> Any:
        nonlocal started
        with lock:  # Other threads wait until the code has run. The code itself, in this thread, may use its own names.
            if not started:
                started = True
                try:
                    loader.exec_module(module)
                except BaseException:
                    started = False  # The next use fails again, with the reason.
                    raise
        if attribute not in vars(module):
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}", name=attribute, obj=module)
        return vars(module)[attribute]

    vars(module)["__getattr__"] = run_then_get
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


# CompressAI's entropy models use one function of scipy.stats, for tables that this codec does not have. It takes 1 s.
import_on_demand("scipy.stats")
import_on_demand("compressai")
# The registry of transforms imports torch_geometric; that of models, modules and optimizers does not.
_registry = import_on_demand("compressai.registry")
_names = vars(import_module("compressai.registry.torch"))
for _name in [_name for _name in _names if not _name.startswith("_")]:
    vars(_registry).setdefault(_name, _names[_name])

# ruff: noqa: E402 – imports after the code that makes them cheap
from compressai.ans import RansDecoder, RansEncoder
from compressai.entropy_models.entropy_models import pmf_to_quantized_cdf
from compressai.models import CompressionModel
from compressai.ops import LowerBound, quantize_ste
from compressai.registry import register_model

__all__ = [
    "CompressionModel",
    "LowerBound",
    "RansDecoder",
    "RansEncoder",
    "pmf_to_quantized_cdf",
    "quantize_ste",
    "register_model",
]
