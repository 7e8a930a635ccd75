"""Codes images to a size in bytes or to a PSNR. The quality, or the λ of the refinement, moves until a file has it."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.bitstream.file_format import EPSILON, CodedImage, check_epsilon
from modules.image_codec import ImageCodec
from modules.refinement import ITERATIONS, Latent, Schedule, refine

_REFINEMENTS, _BLENDS, _QUALITIES = 5, 8, 12
"""Most refinements at different λ, most blends of two latents after them, and most qualities."""

_EFFORT = 2
"""The effort of refinements for other λ, unless the codec has one."""

_RANGE = math.log(16)
"""λ stays within a factor of 16 of the codec's own."""

_SLOPE, _LEAST_SLOPE = 25.0, 5.0
"""Change of the excess with the quality or with log λ: what is expected first, and the least between two attempts."""


class TargetError(ValueError):
    """No file meets the target. The message says what can be reached, or that the search was stopped."""


class Target(NamedTuple):
    """What a file shall have: at most so many bytes, or bits per pixel, or at least a PSNR in dB."""

    unit: Literal["bytes", "bits per pixel", "dB"]
    wanted: float

    def reached(self, codec: ImageCodec, image: Tensor, coded: CodedImage) -> float:
        """What a file has. The PSNR is that of the 8-bit picture."""
        if self.unit == "dB":
            x_hat = (codec.decode(coded).x_hat * 255).round() / 255
            return -10 * math.log10(max(float((x_hat - image).square().mean()), 1e-10))
        size = len(coded.pack())
        return size if self.unit == "bytes" else 8 * size / (image.shape[2] * image.shape[3])

    def permits(self, reached: float) -> bool:
        """Whether a value is good enough, however far."""
        return reached >= self.wanted if self.unit == "dB" else reached <= self.wanted

    def excess(self, reached: float) -> float:
        """How far a value lies above the middle of what is wanted, in units of the accuracy: 1 % of a size, 0.02 dB.

        From −½ to ½ it meets the target. It grows with λ.
        """
        if self.unit == "dB":
            return (reached - self.wanted) / 0.02 - 0.5
        return 100 * math.log(reached / self.wanted) + 0.5


class TargetCodec:
    """Codes each image to a target.

    The quality of a codec of several rates moves by false position; an effort refines each latent as well. Beyond the
    lowest and the highest quality, and for a codec of one rate, the λ of a refinement moves, in at most five attempts
    of the codec's effort, or of effort 2. If none meets the target within 1 % of the size or 0.02 dB, the latents of
    two attempts on either side are blended, which needs no iterations. If none meets it then, `note` is called with
    what the nearest permitted file has, and that file is returned. Before a λ moves, `may_refine` is called with the
    image's height and width; it raises an error if memory does not suffice.
    """

    def __init__(
        self,
        codec: ImageCodec,
        target: Target,
        note: Callable[[str], None] = lambda text: None,
        may_refine: Callable[[int, int], None] = lambda height, width: None,
    ):
        self.codec, self.target, self.note, self.may_refine = codec, target, note, may_refine
        self.model, self.effort, self.decode = codec.model, codec.effort, codec.decode

    @torch.no_grad()
    def encode(self, image: Tensor, icc_profile: bytes = b"", epsilon: float = EPSILON) -> CodedImage:
        """Code one image (1, 3, H, W) in [0, 1] to the target.

        Raises TargetError if it cannot be reached, and what `ImageCodec.encode` and `may_refine` raise.
        """
        self.codec.check(image)
        search = _Search(self.codec, self.target, image, icc_profile, check_epsilon(epsilon), self.may_refine)
        found = search.attempts()
        nearest = min(found, key=lambda attempt: abs(attempt.excess))
        if nearest.meets:
            return nearest.coded
        permitted = [attempt for attempt in found if self.target.permits(attempt.reached)]
        wanted, values = f"{self.target.wanted:g} {self.target.unit}", sorted(attempt.reached for attempt in found)
        if not permitted or len(permitted) == len(found):
            raise TargetError(f"{wanted} cannot be reached: {values[0]:.6g} to {values[-1]:.6g} were")
        nearest = min(permitted, key=lambda attempt: abs(attempt.excess))
        self.note(f"{nearest.reached:.6g} {self.target.unit}, the nearest to {wanted} that was found")
        return nearest.coded


class _Attempt(NamedTuple):
    place: float
    """The quality; or the logarithm of the refinement's λ divided by the codec's own."""
    latent: Latent
    coded: CodedImage
    reached: float
    excess: float

    @property
    def meets(self) -> bool:
        return abs(self.excess) <= 0.5


def _sides(attempts: Sequence[_Attempt]) -> tuple[_Attempt | None, _Attempt | None]:
    """The attempts that come nearest from below and from above."""
    below = [attempt for attempt in attempts if attempt.excess <= 0]
    above = [attempt for attempt in attempts if attempt.excess > 0]
    return (
        max(below, key=lambda attempt: attempt.excess, default=None),
        min(above, key=lambda attempt: attempt.excess, default=None),
    )


def _part(low: _Attempt, high: _Attempt) -> float:
    """Where between two attempts the excess is expected to be 0."""
    return min(max(low.excess / (low.excess - high.excess), 0.1), 0.9)


def _moved(
    attempt: Callable[[float], _Attempt], place: float, bounds: tuple[float, float], most: int
) -> list[_Attempt]:
    """Attempts from a place on, until one meets the target, a bound does not reach it, or there are `most`."""
    found, slope = list[_Attempt](), _SLOPE
    while len(found) < most and not (found and found[-1].meets):
        place = min(max(place, bounds[0]), bounds[1])
        if found and place == found[-1].place:
            break
        last = attempt(place)
        if found:
            slope = max((last.excess - found[-1].excess) / (place - found[-1].place), _LEAST_SLOPE)
        found.append(last)
        low, high = _sides(found)
        if low and high:
            place = low.place + _part(low, high) * (high.place - low.place)
        else:
            place = last.place - 1.2 * last.excess / slope
    return found


class _Search(NamedTuple):
    codec: ImageCodec
    target: Target
    image: Tensor
    icc_profile: bytes
    epsilon: float
    may_refine: Callable[[int, int], None]

    def attempts(self) -> list[_Attempt]:
        """Attempts at different qualities, first without refinement, and for different λ if that is not enough."""
        rates = len(self.codec.model.config.rates)
        if not rates:
            return self._refinements()

        def at_qualities(effort: int, place: float) -> list[_Attempt]:
            return _moved(partial(self._at_quality, effort), place, (1, rates), _QUALITIES)

        found = at_qualities(0, (1 + rates) / 2)
        if self.codec.effort:
            found = at_qualities(self.codec.effort, min(found, key=lambda attempt: abs(attempt.excess)).place)
        end = found[-1]
        if end.meets or end.place not in (1, rates):
            return found
        with self.codec.model.at_quality(end.place):
            return [*found, *self._refinements()]

    def _refinements(self) -> list[_Attempt]:
        """Attempts without refinement, with refinement for different λ, and with blends of two latents."""
        plain = self._attempt(0.0, lambda latent: latent)
        if plain.meets:
            return [plain]
        self.may_refine(*self.image.shape[2:])
        found = [plain, *_moved(self._at_lmbda, -plain.excess / _SLOPE, (-_RANGE, _RANGE), _REFINEMENTS)]
        low, high = _sides(found)
        for _ in range(_BLENDS):
            if found[-1].meets or not (low and high):
                break
            part = _part(low, high)
            blend = Latent(*(a.lerp(b, part) for a, b in zip(low.latent, high.latent, strict=True)))
            last = self._attempt(0.0, lambda _, blend=blend: blend)  # type: ignore[misc]
            found.append(last)
            low, high = (low, last) if last.excess > 0 else (last, high)
        return found

    def _at_quality(self, effort: int, quality: float) -> _Attempt:
        model = self.codec.model
        with model.at_quality(quality):
            return self._attempt(quality, self._refined(Schedule.of(model.check_effort(effort), ITERATIONS[effort])))

    def _at_lmbda(self, shift: float) -> _Attempt:
        effort = self.codec.effort or _EFFORT
        schedule = Schedule.of(self.codec.model.check_effort(effort), ITERATIONS[effort], shift)
        return self._attempt(shift, self._refined(schedule))

    def _refined(self, schedule: Schedule) -> Callable[[Latent], Latent]:
        def go_on(iteration: int, iterations: int) -> bool:
            if not self.codec.go_on(iteration, iterations):
                raise TargetError("stopped before a file met the target")
            return True

        return partial(refine, self.codec.model, self.image, schedule, go_on)

    def _attempt(self, place: float, refined: Callable[[Latent], Latent]) -> _Attempt:
        latents = []

        def kept(latent: Latent) -> Latent:
            latents.append(refined(latent))
            return latents[0]

        y, z = self.codec.model.strings(self.image, self.epsilon, kept)
        coded = CodedImage(self.codec.identity, self.image.shape[2], self.image.shape[3], z, y, self.icc_profile)
        reached = self.target.reached(self.codec, self.image, coded)
        return _Attempt(place, latents[0], coded, reached, self.target.excess(reached))
