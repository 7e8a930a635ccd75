"""`hpcm decompress`: `.hpcm` files to images."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.codec_options import CodecOptions, Output
from pipeline.commands.each_file import convert_each
from pipeline.commands.options import Runs
from pipeline.commands.streams import with_standard_streams
from pipeline.common.tables import Table
from pipeline.evaluation.codec_files import decompress_file
from pipeline.evaluation.conversions import DECOMPRESSION, Conversion, plan


@with_standard_streams("files", ".png")
def decompress(
    files: Annotated[list[Path], typer.Argument(help="`.hpcm` files and folders of them; `-`: standard input.")],
    options: CodecOptions,
    output: Output = None,
    runs: Runs = Path("runs"),
) -> None:
    """Decode `.hpcm` files to PNG, or to the format of the --output file's suffix. All formats but JPEG are lossless.

    Without --checkpoint, each file is decoded by the codec that made it, if that is bundled or in --runs.
    """
    conversions = plan(files, output, DECOMPRESSION, options.overwrite)
    codec_of = options.finder(runs)
    table = Table("", ("file", "W×H"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = decompress_file(codec_of, conversion, options.max_pixels)
        table.add(conversion.name, f"{done.width}×{done.height}")
        return [done.recovery] if done.recovery else []

    convert_each(conversions, convert, table)
