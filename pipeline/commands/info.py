"""`hpcm info`: what coded files and checkpoints contain."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from modules.bitstream.file_format import CodedImage
from modules.saved_codec import PUBLISHED
from pipeline.commands.checkpoint_info import CODEC_FORMS, CheckpointInfo, codec_path, is_codec, known_codecs, name_of
from pipeline.commands.display import show, show_json
from pipeline.commands.each_file import each_file
from pipeline.commands.options import AsJson, Runs
from pipeline.commands.streams import STREAM, from_standard_input
from pipeline.common.tables import Table
from pipeline.evaluation.conversions import SUFFIX, find

Inspected = Annotated[
    list[Path],
    typer.Argument(
        help=f"`.hpcm` files and folders of them, `-` for one from standard input, and codecs. {CODEC_FORMS}"
    ),
]


def info(files: Inspected, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Check `.hpcm` files and checkpoints, and print what they contain.

    The codec of an `.hpcm` file is named if it is bundled or in --runs.
    """
    found: list[dict[str, Any]] = []
    codecs = [path for path in files if path != STREAM and is_codec(path)]
    coded = [path for path in files if path not in codecs]
    complete = True
    if coded:
        with from_standard_input(coded) as local:
            table, complete = _coded_info(local, runs, found)
        if not as_json:
            show(*[table] if table.rows else [])
    for path in codecs:
        checkpoint = CheckpointInfo.read(codec_path(str(path)))
        found.append(checkpoint.to_json())
        if not as_json:
            show(checkpoint.table())
    if as_json:
        show_json(found)
    if not complete:
        raise typer.Exit(1)


def _coded_info(files: list[Path], runs: Path, found: list[dict[str, Any]]) -> tuple[Table, bool]:
    """A table of coded files, and whether all of them could be read. Their values are added to `found`."""
    columns = ("file", "codec", "W×H", "file bpp", "y", "z", "ICC", "ε", "guards")
    table = Table("in bytes: y, z, ICC profile, guards", columns, left=2)
    known = known_codecs(runs)

    def describe(item: tuple[str, Path]) -> Iterable[str]:
        name, path = item
        coded = CodedImage.read(path)
        width, height, identity = coded.width, coded.height, coded.identity.hex()
        size = path.stat().st_size
        bpp = 8 * size / (width * height)
        lengths = {"y": len(coded.y), "z": len(coded.z), "icc": len(coded.icc_profile)}
        checkpoint = name_of(known[identity]) if identity in known else None
        codec = checkpoint.removesuffix(f"/{PUBLISHED}") if checkpoint else f"unknown: {identity}"
        guards = f"{coded.guards.epsilon:.1g}", str(coded.guards.guard_bytes)
        table.add(name, codec, f"{width}×{height}", f"{bpp:.4f}", *map(str, lengths.values()), *guards)
        sizes = {"width": width, "height": height, "bytes": size, "bpp": bpp, "lengths": lengths}
        origin = {"model": identity, "checkpoint": checkpoint}
        found.append({"file": str(path), **sizes, **coded.guards._asdict(), **origin})
        return ()

    return table, each_file([(path, (name, path)) for name, path in find(files, (SUFFIX,))], describe)
