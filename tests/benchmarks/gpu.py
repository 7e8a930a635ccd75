"""Where the time of a training step and of coding goes, by part. One run takes less than nine minutes on an H200.

python tests/benchmarks/gpu.py
python tests/benchmarks/gpu.py --device cpu --preset tiny --crop 128 --batch 2 --size 128x128 --rounds 1
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import AdamW
from torch.profiler import profile, record_function

from modules import HPCM, HPCMConfig, Noise
from modules.bitstream.range_coder import RangeDecoder
from modules.bitstream.rans import SymbolWriter
from pipeline.commands.compare import size_of
from pipeline.common.tables import Table
from pipeline.common.timing import machine, timed
from pipeline.evidence.contenders import photograph
from pipeline.recipes.loading import load_recipe
from pipeline.training.codec_choice import config_of
from pipeline.training.cuda_graph import GraphedGradients
from pipeline.training.objectives import RateDistortion, training_noise

CODECS = {"Baseline": "baseline", "Phase 4": "phase4", "lean-conv": "lean-conv"}
"""Codecs, and their stages in the recipe `evidence`."""
PARTS = {
    "transforms": ("g_a", "g_s", "h_a", "h_s"),
    "adaptors": (
        "y_spatial_prior_adaptor_list_s1",
        "y_spatial_prior_adaptor_list_s2",
        "y_spatial_prior_adaptor_list_s3",
    ),
    "priors": ("y_spatial_prior_s1_s2", "y_spatial_prior_s3"),
    "attention": ("attn_s1", "attn_s2", "attn_s3"),
    "fusion": ("context_net",),
    "likelihoods": ("entropy_estimation",),
}
KERNEL, OPTIMIZER, SUMS, OTHER = "Bi-WKV4", "clipping and optimizer", "sums of gradients", "other"
MARK = "part: "
PROFILED = 2
"""Steps that are profiled."""


@dataclass(frozen=True)
class Variant:
    """How a training step computes."""

    name: str
    graph: bool = False
    bf16: bool = False
    convolutions: str = "tf32"
    products: str = "ieee"
    layout: torch.memory_format = torch.channels_last
    fused: bool = True


VARIANTS = (
    Variant("float32, single launches"),
    Variant("float32, graph", graph=True),
    Variant("float32, graph, no TF32", graph=True, convolutions="ieee"),
    Variant("float32, graph, TF32 in products too", graph=True, products="tf32"),
    Variant("bf16, single launches", bf16=True),
    Variant("bf16, graph", graph=True, bf16=True),
    Variant("bf16, graph, channels first", graph=True, bf16=True, layout=torch.contiguous_format),
    Variant("bf16, graph, AdamW of several kernels", graph=True, bf16=True, fused=False),
)


def training_step(model: HPCM, variant: Variant, images: Tensor, noise: Noise) -> Callable[[], None]:
    """A function that trains one step: gradients, clipping and update."""
    device, parameters = images.device, list(model.train().to(memory_format=variant.layout).parameters())
    optimizer, objective = AdamW(parameters, lr=1e-6, fused=variant.fused), RateDistortion(model, 0.013, "mse")
    optimizer.zero_grad()

    def compute(images: Tensor, noise: Noise) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16):
            values = objective(images, noise)
        values["loss"].float().backward()
        return {name: value.detach() for name, value in values.items()}

    graphed = variant.graph and device.type == "cuda"
    gradients = GraphedGradients(compute, parameters) if graphed else compute

    def step() -> None:
        optimizer.zero_grad(set_to_none=not graphed)
        gradients(images, noise)
        with record_function(MARK + OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return step


@contextmanager
def precisions(variant: Variant) -> Iterator[None]:
    """Compute float32 convolutions and products as the variant says."""
    owners: tuple[Any, Any] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner, precision in zip(owners, (variant.convolutions, variant.products), strict=True):
            owner.fp32_precision = precision
        yield
    finally:
        for owner, precision in zip(owners, before, strict=True):
            owner.fp32_precision = precision


@contextmanager
def wrapped(model: HPCM, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within the context, wrap the calls of each part of a codec, and of the range coder, by the part's name."""
    modules = [(part, model.get_submodule(name)) for part, names in PARTS.items() for name in names]
    found: list[tuple[Any, str, str]] = [
        (layer, "forward", part)
        for part, module in modules
        for layer in (module if isinstance(module, torch.nn.ModuleList) else [module])
    ]
    found += [(RangeDecoder, "decode", "range coding"), (SymbolWriter, "coded", "range coding")]
    before = [vars(owner).get(name) for owner, name, _ in found]
    for owner, name, part in found:
        setattr(owner, name, wrap(part, getattr(owner, name)))
    try:
        yield
    finally:
        for (owner, name, _), method in zip(found, before, strict=True):
            delattr(owner, name) if method is None else setattr(owner, name, method)


def marked(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose operators the profiler finds under the name of a part."""

    def run(*arguments: Any) -> Any:
        with record_function(MARK + part):
            return call(*arguments)

    return run


def milliseconds_by_part(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of the kernels of a step by part. A gradient belongs to the part of its operator."""
    with profile() as found:
        for _ in range(PROFILED):
            timed(step, device)
    events = [event for event in found.events() if event.device_type == DeviceType.CPU]
    of_forward: dict[int, str] = {}

    def part_of(event: Any) -> str:
        while event is not None:
            name = event.name
            if "biwkv4" in name.lower():
                return KERNEL
            if name.startswith(MARK):
                return name.removeprefix(MARK)
            if name.startswith("autograd::engine"):
                return SUMS if "AccumulateGrad" in name else of_forward.get(event.sequence_nr, OTHER)
            event = event.cpu_parent
        return OTHER

    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::engine"):
            of_forward.setdefault(event.sequence_nr, part_of(event))
            if part_of(event) == KERNEL:
                of_forward[event.sequence_nr] = KERNEL
    times: dict[str, float] = defaultdict(float)
    for event in events:
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[part_of(event)] += spent / 1000 / PROFILED
    return times


def median_milliseconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The median time of a call, after three that warm up."""
    for _ in range(3):
        call()
    return 1000 * median(timed(call, device) for _ in range(rounds))


def training(configs: dict[str, HPCMConfig], device: torch.device, batch: int, crop: int, rounds: int) -> list[Table]:
    """The time of a step by variant, and of its parts in float32."""
    steps = Table(f"ms per training step, {batch} crops of {crop}", ("variant", *configs))
    parts = Table("its kernels in float32, by part, single launches", ("part", *configs))
    times, found = defaultdict[Variant, list[float]](list), list[dict[str, float]]()
    for config in configs.values():
        torch.manual_seed(0)
        model = HPCM(config).to(device)
        noise = Noise(*(x.to(device) for x in training_noise(model, (crop, crop), 0, range(batch))))
        step = partial(training_step, model, images=torch.rand(batch, 3, crop, crop, device=device), noise=noise)
        for variant in VARIANTS:
            with precisions(variant):
                times[variant].append(median_milliseconds(step(variant), device, rounds))
        with precisions(VARIANTS[0]), wrapped(model, marked):
            found.append(milliseconds_by_part(step(VARIANTS[0]), device))
        kernels = sum(found[-1].values())
        for variant in VARIANTS[:2] if device.type == "cuda" else ():
            found[-1][f"gaps between kernels, {variant.name}"] = times[variant][-1] - kernels
    for variant, values in times.items():
        steps.add(variant.name, *(f"{value:.1f}" for value in values))
    for part in dict.fromkeys(part for of_codec in found for part in of_codec):
        parts.add(part, *(f"{of_codec.get(part, 0):.1f}" for of_codec in found))
    return [steps, parts]


def coding(configs: dict[str, HPCMConfig], device: torch.device, sizes: list[str], rounds: int) -> Iterator[Table]:
    """The time of encoding and decoding, with CUDA graphs of the coding steps and without, and by part without.

    The parts wait for the GPU, so they add up to more than the whole.
    """
    for size in sizes:
        columns, found = list[str](), list[dict[str, float]]()
        for name, config in configs.items():
            torch.manual_seed(0)
            model = HPCM(config).to(device).eval()
            model.update()
            image = photograph(size_of(size)).to(device)
            coded = model.compress(image)
            calls = {"encode": partial(model.compress, image), "decode": partial(model.decompress, **coded)}
            for direction, call in calls.items():
                whole, spent = dict[str, float](), dict[str, float]()
                for graphs in (True, False) if device.type == "cuda" else (False,):
                    model.cuda_graphs = graphs
                    row = "whole, graphs" if graphs else "whole, single launches"
                    whole[row] = median_milliseconds(call, device, rounds)
                with wrapped(model, partial(clocked, spent, device)):
                    clocked_whole = 1000 * timed(call, device)
                spent["tables, copies and rows"] = clocked_whole - sum(spent.values())
                columns.append(f"{name}, {direction}")
                found.append({**whole, **spent})
        table = Table(f"ms for an image of {size}", ("part", *columns))
        for part in dict.fromkeys(part for of_codec in found for part in of_codec):
            table.add(part, *(f"{of_codec.get(part, 0):.1f}" for of_codec in found))
        yield table


def clocked(spent: dict[str, float], device: torch.device, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose milliseconds are added to those of a part."""

    def run(*arguments: Any) -> Any:
        result: list[Any] = []
        seconds = timed(lambda: result.append(call(*arguments)), device)
        spent[part] = spent.get(part, 0) + 1000 * seconds
        return result[0]

    return run


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="base", help="base, large or tiny, untrained")
    parser.add_argument("--batch", type=int, default=16, help="crops of a training step; 0: no training")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--size", nargs="*", default=["512x768", "1080x1920"], help="images to code")
    parser.add_argument("--rounds", type=int, default=10, help="measurements, of which the median is printed")
    given = parser.parse_args()
    began, device = time.monotonic(), torch.device(given.device)
    stages = load_recipe("evidence", [f"model.preset={given.preset}"]).stages
    configs = {name: config_of(stages[stage]) for name, stage in CODECS.items()}
    print(f"{machine(given.device)}; PyTorch {torch.__version__}; {given.preset}", flush=True)
    if given.batch:
        trained = {name: configs[name] for name in ("Baseline", "Phase 4")}
        for table in training(trained, device, given.batch, given.crop, given.rounds):
            print(f"\n{table.plain()}", flush=True)
    for table in coding(configs, device, given.size, given.rounds):
        print(f"\n{table.plain()}", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
