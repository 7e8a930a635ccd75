"""Costs of several codecs: times, measured in turns, and peak memory, each in a fresh process.

Activities: `forward` (an evaluation without a bitstream), `encode` and `decode` (real bitstreams), and training steps
on one image, `frozen` (trains what is new against the codec's parent) and `unfrozen` (trains everything).
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from modules import HPCM, HPCMConfig
from pipeline.common.fresh_process import in_fresh_process, within_memory
from pipeline.common.memory import largest_resident_size
from pipeline.common.timing import timed
from pipeline.data.images import find_images
from pipeline.data.pictures import read_image
from pipeline.training.objectives import RateDistortion, training_noise
from pipeline.training.parameter_groups import set_trainable
from pipeline.training.transfer import corresponding, new_tensors
from pipeline.weights.checkpoints import codec_tensors, load_codec

CODING = ("forward", "encode", "decode")
TRAINING = ("frozen", "unfrozen")
MEMORY = ("decode", *TRAINING)
"""Activities whose memory is measured. The process that decodes encodes first."""
SHORTEST = 0.2
"""Seconds for which a measurement repeats an activity."""
LMBDA = 0.013
"""λ of the loss in training steps. Their time does not depend on it."""

Size = tuple[int, int]
Note = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Contender:
    """A codec to measure: a published checkpoint, or untrained."""

    name: str
    config: HPCMConfig
    checkpoint: Path | None
    parent: HPCMConfig | None
    """The parent's configuration. A frozen segment trains what is new against it."""

    def build(self, device: str) -> HPCM:
        """Build the codec, ready for coding."""
        if self.checkpoint is not None:
            return load_codec(self.checkpoint).to(device)
        torch.manual_seed(0)
        model = HPCM(self.config).to(device).eval()
        model.update()
        return model

    @cached_property
    def activities(self) -> tuple[str, ...]:
        """The activities that can be measured: `frozen` only if something is new against the parent."""
        return (*CODING, *(TRAINING if self.new_names() else TRAINING[1:]))

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in HPCM.on_meta(self.config).parameters())

    def new_names(self) -> frozenset[str]:
        """Parameters that a frozen segment trains: those that the parent lacks, and all of components that it lacks."""
        if self.parent is None:
            return frozenset()
        child, parent = HPCM.on_meta(self.config), HPCM.on_meta(self.parent)
        ours, theirs = codec_tensors(child), codec_tensors(parent)
        pairs = corresponding(parent, child).items()
        kept = {name: source for name, source in pairs if ours[name].shape == theirs[source].shape}
        return new_tensors(parent, child, kept)


class Subject:
    """A contender in memory, and its activities on one image (1, 3, H, W)."""

    def __init__(self, contender: Contender, image: Tensor, device: str):
        self.contender, self.image = contender, image.to(device)
        self.model = contender.build(device)
        self._new = contender.new_names()
        self._coded: dict[str, object] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def activity(self, name: str) -> Callable[[], object]:
        """The function that performs an activity."""
        activities: dict[str, Callable[[], object]] = {
            "forward": self._forward,
            "encode": self._encode,
            "decode": self._decode,
            "frozen": partial(self._train, "frozen"),
            "unfrozen": partial(self._train, "unfrozen"),
        }
        return activities[name]

    def look_at(self, image: Tensor) -> None:
        """Switch to another image; drops the bitstream and optimizers kept for the last one."""
        self.image, self._coded, self._optimizers = image.to(self.image.device), {}, {}

    @torch.no_grad()
    def _forward(self) -> None:
        self.model.eval()(self.image)

    def _encode(self) -> None:
        self._coded = self.model.eval().compress(self.image)

    def _decode(self) -> None:
        self.model.eval()
        if not self._coded:
            self._encode()
        self.model.decompress(**self._coded)  # type: ignore[arg-type]

    def _train(self, what: str) -> None:
        model = self.model.train()
        every = frozenset(name for name, _ in model.named_parameters())
        set_trainable(model, self._new if what == "frozen" else every)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if what not in self._optimizers:
            self._optimizers[what] = torch.optim.Adam(trained, lr=0.0, fused=True)
        try:
            self._step(trained, self._optimizers[what])
        finally:
            model.zero_grad(set_to_none=True)
            model.requires_grad_(False)

    def _step(self, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        model = self.model
        noise = training_noise(model, (self.image.shape[2], self.image.shape[3]), 0, [0])
        noise = type(noise)(*(part.to(self.image.device) for part in noise))
        loss = RateDistortion(model, LMBDA, "mse")(self.image, noise)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def photograph(size: Size) -> Tensor:
    """A packaged photograph, cropped or extended by reflection to (1, 3, H, W)."""
    pixels = read_image(find_images(None, "val", 1).paths[0])[: size[0], : size[1]]
    missing = [(0, side - have) for side, have in zip(size, pixels.shape[:2], strict=True)]
    pixels = np.pad(pixels, [*missing, (0, 0)], mode="symmetric")
    return torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255)


def measure_times(
    contenders: Sequence[Contender], sizes: Mapping[Size, Sequence[str]], rounds: int, device: str, note: Note
) -> dict[tuple[Size, str, str], list[float]]:
    """Seconds by (size, activity, contender), one value per round.

    `sizes` gives the activities to measure at each size. In each round and activity the contenders take turns, so that
    other load on the machine slows all of them; every second round reverses their order. What does not fit into memory
    is reported to `note` and left out.
    """
    image = photograph(next(iter(sizes)))
    subjects = []
    for contender in contenders:
        subject = within_memory(partial(Subject, contender, image, device))
        if subject is None:
            note(f"{contender.name}: does not fit into memory with the others; its times are left out")
        else:
            subjects.append(subject)
    samples: dict[tuple[Size, str, str], list[float]] = {}
    for size, activities in sizes.items():
        image = photograph(size)
        for subject in subjects:
            subject.look_at(image)
        samples |= _rounds(subjects, size, activities, rounds, note)
    return samples


def _rounds(
    subjects: Sequence[Subject], size: Size, activities: Sequence[str], rounds: int, note: Note
) -> dict[tuple[Size, str, str], list[float]]:
    name = f"{size[0]}×{size[1]}"
    samples: dict[tuple[Size, str, str], list[float]] = {
        (size, activity, subject.contender.name): []
        for activity in activities
        for subject in subjects
        if activity in subject.contender.activities
    }
    for number in range(-1, rounds):  # The first round warms up and is not counted.
        shortest = SHORTEST if number >= 0 else 0
        for activity in activities:
            for subject in subjects[:: -1 if number % 2 else 1]:
                key = size, activity, subject.contender.name
                if key not in samples:
                    continue
                seconds = within_memory(partial(_repeated, subject.activity(activity), subject.image.device, shortest))
                if seconds is None:
                    note(f"{name} {activity} of {subject.contender.name}: out of memory; left out")
                    del samples[key]
                elif number >= 0:
                    samples[key].append(seconds)
            note(f"{name} {activity}: " + (f"round {number + 1} of {rounds}" if number >= 0 else "warm"))
    return samples


def _repeated(call: Callable[[], object], device: torch.device, shortest: float) -> float:
    """Median time of a call, repeated until the times sum to `shortest` seconds."""
    times = [timed(call, device)]
    while sum(times) < shortest:
        times.append(timed(call, device))
    return statistics.median(times)


def measure_memory(contender: Contender, size: Size, activity: str, device: str) -> int | None:
    """Peak memory of an activity in bytes, measured in a fresh process; None if it ran out of memory or died.

    On a GPU this is the most that PyTorch allocated. On a CPU it is the growth of the process's peak resident size
    after the codec began to be built, so that Python and PyTorch themselves are not counted.
    """
    return in_fresh_process(_peak, contender, size, activity, device)


def _peak(contender: Contender, size: Size, activity: str, device: str) -> int:
    image = photograph(size)
    if device != "cpu":
        Subject(contender, image, device).activity(activity)()
        return torch.cuda.max_memory_allocated(device)
    before = largest_resident_size()
    Subject(contender, image, device).activity(activity)()
    return largest_resident_size() - before
