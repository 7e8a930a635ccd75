"""`hpcm compress`: images to `.hpcm` files."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Annotated, Any

import typer

from modules.bitstream.file_format import EPSILON, check_epsilon
from modules.image_codec import ImageCodec
from modules.target_codec import Target, TargetCodec
from pipeline.commands.codec_options import CodecOptions, Effort, Lmbda, Output, Pictures, quality_option, set_lmbda
from pipeline.commands.each_file import Refinement, convert_each
from pipeline.commands.options import AsJson
from pipeline.commands.streams import with_standard_streams
from pipeline.common.errors import raised_as
from pipeline.common.tables import Table, number
from pipeline.evaluation.codec_files import compress_file
from pipeline.evaluation.conversions import COMPRESSION, Conversion
from pipeline.evaluation.limits import check_size


@dataclass(frozen=True)
class TargetOptions:
    """What each file shall have; at most one is given."""

    num_bytes: Annotated[int | None, typer.Option("--bytes", min=1)] = None
    """At most so many bytes for each file, header and ICC profile included."""
    bpp: Annotated[float | None, typer.Option(min=1e-6, max=1e6)] = None
    """At most so many bits per pixel for each file."""
    psnr: Annotated[float | None, typer.Option(min=0, max=99)] = None
    """At least this PSNR in dB for each image."""

    @property
    def target(self) -> Target | None:
        """What is asked for. Raises BadParameter if more than one is given."""
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise typer.BadParameter("--bytes, --bpp and --psnr each say where to stop: give one of them")
        if self.num_bytes is not None:
            return Target("bytes", self.num_bytes)
        if self.bpp is not None:
            return Target("bits per pixel", self.bpp)
        return None if self.psnr is None else Target("dB", self.psnr)


@dataclass(frozen=True)
class CompressionOptions(CodecOptions):
    """How images are compressed."""

    quality: Annotated[float | None, quality_option("the middle")] = None
    epsilon: float = EPSILON
    """Relative error in a decoder's scales that the file tolerates; 0: none."""
    effort: Effort = 0
    lmbda: Lmbda = None
    verify: bool = True
    """Decode each file before writing it, to check it."""

    def check(self, targets: TargetOptions) -> None:
        """Raise BadParameter for an ε that cannot be used, and for two options that choose the rate."""
        if targets.target and self.quality:
            raise typer.BadParameter("--quality: --bytes, --bpp and --psnr choose the quality; give one of them")
        with raised_as(typer.BadParameter, prefix="--epsilon: "):
            check_epsilon(self.epsilon)


@with_standard_streams("pictures", ".hpcm")
def compress(
    pictures: Pictures,
    options: CompressionOptions,
    targets: TargetOptions,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Compress images to `.hpcm` files. Each file is decoded before it is written, to check it and to measure PSNR.

    The EXIF orientation is applied and the ICC profile is kept. Transparent images are blended with white, and 16 bits
    per channel are reduced to 8; a message says so.

    With --effort, Ctrl-C completes the current image with the best that was found; with a target it writes no file.
    A second Ctrl-C stops at once.

    --bytes, --bpp and --psnr are targets. The quality moves until the file is within 1 % of its size, or 0.02 dB above
    its PSNR. Beyond the lowest and the highest quality, and for a codec of one rate, the λ of a refinement moves
    instead, with effort 2 unless another is given. If no file comes so near, the nearest is written, and a message says
    so. A target that cannot be reached is an error.
    """
    options.check(targets)
    conversions, found = options.plan(pictures, output, COMPRESSION), list[dict[str, Any]]()
    notes = list[str]()
    model, refinement = options.model(options.quality), Refinement(completes=True)
    target, refines = targets.target, options.effort > 0 or targets.target is not None
    set_lmbda(model, options.lmbda, refines)
    plain = ImageCodec(model, options.effort, refinement.go_on)
    may_refine = partial(check_size, model, max_pixels=options.max_pixels, refined=True)
    codec = TargetCodec(plain, target, notes.append, may_refine) if target else plain
    table = Table("", ("file", "W×H", "bytes", "file bits/pixel", "PSNR dB", "encode s", "decode s"))

    def convert(conversion: Conversion) -> Iterable[str]:
        notes.clear()
        done = compress_file(codec, conversion, options.epsilon, options.verify, options.max_pixels)
        found.append({"source": str(conversion.source), "target": str(conversion.target), **asdict(done)})
        size = f"{done.width}×{done.height}", f"{done.file_bytes}", f"{done.bpp:.4f}"
        times = (number(seconds, ".2f") for seconds in (done.encode_seconds, done.decode_seconds))
        table.add(conversion.name, *size, number(done.psnr_db, ".2f"), *times)
        return (*done.changes, *notes)

    convert_each(conversions, convert, table, found if as_json else None, refinement if refines else None)
