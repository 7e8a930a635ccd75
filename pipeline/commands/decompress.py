"""`hpcm decompress`: `.hpcm` files to images."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.commands.codec_options import CodecOptions, Output
from pipeline.commands.each_file import convert_each
from pipeline.commands.options import AsJson, Runs
from pipeline.commands.streams import with_standard_streams
from pipeline.common.tables import Table
from pipeline.evaluation.codec_files import decompress_file
from pipeline.evaluation.conversions import DECOMPRESSION, Conversion


@with_standard_streams("files", ".png")
def decompress(
    files: Annotated[list[Path], typer.Argument(help="`.hpcm` files and folders of them; `-`: standard input.")],
    options: CodecOptions,
    output: Output = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Decode `.hpcm` files to PNG, or to the format of the --output file's suffix. All formats but JPEG are lossless.

    Without --checkpoint, each file is decoded by the codec that made it, if that is bundled or in --runs.
    """
    conversions, found = options.plan(files, output, DECOMPRESSION), list[dict[str, Any]]()
    codec_of = options.finder(runs)
    table = Table("", ("file", "W×H"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = decompress_file(codec_of, conversion, options.max_pixels)
        found.append({"source": str(conversion.source), "target": str(conversion.target), **asdict(done)})
        table.add(conversion.name, f"{done.width}×{done.height}")
        return [done.recovery] if done.recovery else []

    convert_each(conversions, convert, table, found if as_json else None)
