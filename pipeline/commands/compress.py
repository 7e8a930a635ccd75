"""`hpcm compress`: images to `.hpcm` files."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import typer

from modules.bitstream.file_format import EPSILON, check_epsilon
from modules.image_codec import ImageCodec
from pipeline.commands.codec_options import CodecOptions, Effort, Lmbda, Output, Pictures, set_lmbda
from pipeline.commands.display import console
from pipeline.commands.each_file import Refinement, convert_each
from pipeline.commands.streams import with_standard_streams
from pipeline.common.tables import Table, number
from pipeline.evaluation.codec_files import compress_file
from pipeline.evaluation.conversions import COMPRESSION, Conversion, plan


@dataclass(frozen=True)
class CompressionOptions(CodecOptions):
    """How images are compressed."""

    quality: Annotated[float | None, typer.Option(min=1)] = None
    """1 gives the smallest files. Without -c, the number of a bundled codec; with -c, any number from 1 to that of the
    codec's rates [default: the middle]."""
    epsilon: Annotated[
        float, typer.Option(help="Relative error in a decoder's scales that the file tolerates; 0: none.")
    ] = EPSILON
    effort: Effort = 0
    lmbda: Lmbda = None
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode each file before writing it, to check it.")
    ] = True
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Skip images whose output file exists.")] = (
        False
    )

    def check(self) -> None:
        """Raise BadParameter for an ε that cannot be used."""
        try:
            check_epsilon(self.epsilon)
        except ValueError as error:
            raise typer.BadParameter(f"--epsilon: {error}") from error


@with_standard_streams("pictures", ".hpcm")
def compress(pictures: Pictures, options: CompressionOptions, output: Output = None) -> None:
    """Compress images to `.hpcm` files. Each file is decoded before it is written, to check it and to measure PSNR.

    The EXIF orientation is applied and the ICC profile is kept. Transparent images are blended with white, and 16 bits
    per channel are reduced to 8; a message says so.

    With --effort, Ctrl-C completes the current image with the best that was found. A second Ctrl-C stops at once.
    """
    options.check()
    conversions = plan(pictures, output, COMPRESSION, options.overwrite or options.skip_existing)
    if options.skip_existing:
        found, conversions = conversions, [item for item in conversions if not item.target.exists()]
        if skipped := len(found) - len(conversions):
            console.print(f"skipped: {skipped} of {len(found)}, because their files exist")
        if not conversions:
            return
    model, refinement = options.model(options.quality), Refinement()
    set_lmbda(model, options.lmbda, options.effort)
    codec = ImageCodec(model, options.effort, refinement.go_on)
    table = Table("", ("file", "W×H", "bytes", "file bits/pixel", "PSNR dB", "encode s", "decode s"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = compress_file(codec, conversion, options.epsilon, options.verify, options.max_pixels)
        table.add(
            conversion.name,
            f"{done.width}×{done.height}",
            f"{done.file_bytes}",
            f"{done.bpp:.4f}",
            number(done.psnr_db, ".2f"),
            f"{done.encode_seconds:.2f}",
            number(done.decode_seconds, ".2f"),
        )
        return done.changes

    convert_each(conversions, convert, table, refinement if options.effort else None)
