"""Codes images to a size in bytes or to a PSNR. The λ of the refinement moves until the file meets the target."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.bitstream.coding import Decoded
from modules.bitstream.file_format import EPSILON, CodedImage, check_epsilon
from modules.image_codec import ImageCodec
from modules.refinement import ITERATIONS, Latent, Schedule, refine

_REFINEMENTS, _BLENDS, _QUALITIES = 5, 8, 12
"""Most refinements with one codec, most blends of two latents after them, and most qualities of a codec of rates."""

_RANGE = math.log(16)
"""λ stays within a factor of 16 of the codec's own."""

_SLOPE, _LEAST_SLOPE = 25.0, 5.0
"""Change of the excess with log λ: what is expected at first, and the least that two refinements may show."""


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
    """Codes each image to a target, with the one of several codecs that comes nearest without refinement.

    The λ of the refinement moves by false position, in at most five attempts. If none meets the target within 1 % of
    the size or 0.02 dB, the latents of two attempts on either side are blended, which needs no iterations. If none
    meets it then, the next codec is tried. If it does not help, `note` is called with what the nearest permitted file
    has, and that file is returned. Raises ValueError for codecs of effort 0.

    A codec of several rates needs none of this, and no effort: its quality moves.
    """

    def __init__(self, codecs: Sequence[ImageCodec], target: Target, note: Callable[[str], None] = lambda text: None):
        if not all(codec.effort or codec.model.config.rates for codec in codecs):
            raise ValueError("a target needs an effort from 1 to 4: the refinement moves the size of a file")
        self.codecs, self.target = {codec.identity: codec for codec in codecs}, target
        self.model, self.effort, self.note = codecs[0].model, codecs[0].effort, note

    @torch.no_grad()
    def encode(self, image: Tensor, icc_profile: bytes = b"", epsilon: float = EPSILON) -> CodedImage:
        """Code one image (1, 3, H, W) in [0, 1] to the target.

        Raises TargetError if it cannot be reached, and what `ImageCodec.encode` raises.
        """
        search = _Search(self.target, image, icc_profile, check_epsilon(epsilon))
        if self.model.config.rates:
            found, searches = list[_Attempt](), map(search.at_qualities, self.codecs.values())
        else:
            found = sorted(map(search.plain, self.codecs.values()), key=lambda attempt: attempt.distance)
            searches = map(search.attempts, found[:2])
        for attempts in searches:
            for attempt in reversed(attempts):  # The first one is not refined.
                if attempt.meets:
                    return attempt.coded
            found += attempts
        permitted = [attempt for attempt in found if self.target.permits(attempt.reached)]
        wanted, values = f"{self.target.wanted:g} {self.target.unit}", sorted(attempt.reached for attempt in found)
        if not permitted or len(permitted) == len(found):
            raise TargetError(f"{wanted} cannot be reached: {values[0]:.6g} to {values[-1]:.6g} were")
        nearest = min(permitted, key=lambda attempt: abs(attempt.excess))
        self.note(f"{nearest.reached:.6g} {self.target.unit}, the nearest to {wanted} that was found")
        return nearest.coded

    def decode(self, coded: CodedImage) -> Decoded:
        """What `ImageCodec.decode` returns, with the codec that made the file."""
        return self.codecs[coded.identity].decode(coded)


class _Attempt(NamedTuple):
    codec: ImageCodec
    shift: float
    """Logarithm of λ divided by the codec's own. For a codec of several rates, its quality."""
    latent: Latent
    coded: CodedImage
    reached: float
    excess: float

    @property
    def meets(self) -> bool:
        return abs(self.excess) <= 0.5

    @property
    def distance(self) -> float:
        """To add detail that a codec was not trained for costs more than to remove it."""
        return max(self.excess, -1.5 * self.excess)


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


class _Search(NamedTuple):
    target: Target
    image: Tensor
    icc_profile: bytes
    epsilon: float

    def plain(self, codec: ImageCodec) -> _Attempt:
        """The file without refinement."""
        codec.check(self.image)
        return self._attempt(codec, 0.0, lambda latent: latent)

    def attempts(self, plain: _Attempt) -> list[_Attempt]:
        """Attempts until one meets the target, or until no more are left. The first is the given one."""
        found = [plain, *self._refinements(plain)]
        low, high = _sides(found)
        for _ in range(_BLENDS):
            if found[-1].meets or not (low and high):
                break
            part = _part(low, high)
            blend = Latent(*(a.lerp(b, part) for a, b in zip(low.latent, high.latent, strict=True)))
            last = self._attempt(plain.codec, 0.0, lambda _, blend=blend: blend)  # type: ignore[misc]
            found.append(last)
            low, high = (low, last) if last.excess > 0 else (last, high)
        return found

    def at_qualities(self, codec: ImageCodec) -> list[_Attempt]:
        """Attempts at the highest and lowest quality, then between them until one meets the target."""
        codec.check(self.image)
        found = [self._at_quality(codec, quality) for quality in (len(codec.model.config.rates), 1)]
        for _ in range(_QUALITIES):
            low, high = _sides(found)
            if any(attempt.meets for attempt in found) or not (low and high):
                break
            found.append(self._at_quality(codec, low.shift + _part(low, high) * (high.shift - low.shift)))
        return found

    def _at_quality(self, codec: ImageCodec, quality: float) -> _Attempt:
        with codec.model.at_quality(quality):
            schedule = Schedule.of(codec.model.check_effort(codec.effort), ITERATIONS[codec.effort])
            return self._attempt(codec, quality, self._refined(codec, schedule))

    def _refinements(self, plain: _Attempt) -> list[_Attempt]:
        codec, found = plain.codec, list[_Attempt]()
        shift, slope = -plain.excess / _SLOPE, _SLOPE
        lmbda, iterations = codec.model.check_effort(codec.effort), ITERATIONS[codec.effort]
        while len(found) < _REFINEMENTS and not (found and (found[-1].meets or abs(found[-1].shift) == _RANGE)):
            shift = min(max(shift, -_RANGE), _RANGE)
            schedule = Schedule.of(lmbda, iterations, shift)
            last = self._attempt(codec, shift, self._refined(codec, schedule))
            if found and shift != found[-1].shift:
                slope = max((last.excess - found[-1].excess) / (shift - found[-1].shift), _LEAST_SLOPE)
            found.append(last)
            low, high = _sides(found)
            if low and high:
                shift = low.shift + _part(low, high) * (high.shift - low.shift)
            else:
                shift = last.shift - 1.2 * last.excess / slope
        return found

    def _refined(self, codec: ImageCodec, schedule: Schedule) -> Callable[[Latent], Latent]:
        def go_on(iteration: int, iterations: int) -> bool:
            if not codec.go_on(iteration, iterations):
                raise TargetError("stopped before a file met the target")
            return True

        return partial(refine, codec.model, self.image, schedule, go_on)

    def _attempt(self, codec: ImageCodec, shift: float, refined: Callable[[Latent], Latent]) -> _Attempt:
        latents = []

        def kept(latent: Latent) -> Latent:
            latents.append(refined(latent))
            return latents[0]

        y, z = codec.model.strings(self.image, self.epsilon, kept)
        coded = CodedImage(codec.identity, self.image.shape[2], self.image.shape[3], z, y, self.icc_profile)
        reached = self.target.reached(codec, self.image, coded)
        return _Attempt(codec, shift, latents[0], coded, reached, self.target.excess(reached))
