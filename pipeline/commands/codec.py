"""The commands that use a codec: `hpcm compress`, `decompress`, `info`, `evaluate` and `bench codec`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pipeline.commands.options import AsJson, Device, Quiet, Runs, device_of, size_of
from pipeline.commands.streams import with_standard_streams
from pipeline.common.errors import UserError
from pipeline.common.packaged import WEIGHTS
from pipeline.common.tables import Table, number

if TYPE_CHECKING:
    from modules.bitstream import ImageCodec
    from pipeline.evaluation.codec_files import Conversion
    from pipeline.evaluation.coding import ImageResult

SHIPPED = WEIGHTS / "lean.safetensors"
"""The bundled codec; its model card lies beside it."""

Checkpoint = Annotated[
    Path,
    typer.Option(
        "--checkpoint",
        "-c",
        help="The codec: a stage's checkpoint.safetensors, or its folder.",
        show_default="the bundled one",
    ),
]
Pictures = Annotated[list[Path], typer.Argument(help="Images, and folders of them; `-`: standard input.")]
Coded = Annotated[list[Path], typer.Argument(help="`.hpcm` files, and folders of them; `-`: standard input.")]
Inspected = Annotated[
    list[Path], typer.Argument(help="`.hpcm` files and folders of them, checkpoints, stages' folders.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="File or folder to write, `-`: standard output [default: beside].")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Item = TypeVar("Item")


@with_standard_streams("pictures", ".hpcm")
def compress(
    pictures: Pictures,
    checkpoint: Checkpoint = SHIPPED,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    skip_existing: Annotated[bool, typer.Option("--skip-existing", help="Leave out what was coded before.")] = False,
    quiet: Quiet = False,
) -> None:
    """Code images as `.hpcm` files. Each is decoded again before it is written, which gives its PSNR.

    Images are stored the right way up (EXIF) and with their ICC profile. Transparency is laid on white and 16 bits
    a channel become 8, with a message.
    """
    from pipeline.evaluation import codec_files

    _speak(not quiet)
    conversions = codec_files.plan(pictures, output, codec_files.COMPRESSION, overwrite or skip_existing)
    if skip_existing:
        conversions = [conversion for conversion in conversions if not conversion.target.exists()]
    codec = _codec(checkpoint, device)
    table = Table("", ("file", "W×H", "bytes", "file bits/pixel", "PSNR dB", "encode s", "decode s"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = codec_files.compress_file(codec, conversion)
        table.add(
            conversion.name,
            f"{done.width}×{done.height}",
            f"{done.file_bytes}",
            f"{done.bpp:.4f}",
            f"{done.psnr_db:.2f}",
            f"{done.encode_seconds:.2f}",
            f"{done.decode_seconds:.2f}",
        )
        return done.changes

    _end(table, _each([(conversion.source, conversion) for conversion in conversions], convert))


@with_standard_streams("files", ".png")
def decompress(
    files: Coded,
    checkpoint: Checkpoint = SHIPPED,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    runs: Runs = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Decode `.hpcm` files to PNG, or to the format of the name given with --output: all but JPEG keep every bit."""
    from pipeline.evaluation import codec_files

    _speak(not quiet)
    conversions = codec_files.plan(files, output, codec_files.DECOMPRESSION, overwrite)
    codec = _codec(checkpoint, device)
    table = Table("", ("file", "W×H"))

    def convert(conversion: Conversion) -> Iterable[str]:
        _check_codec(codec, conversion.source, runs)
        coded = codec_files.decompress_file(codec, conversion)
        table.add(conversion.name, f"{coded.width}×{coded.height}")
        return ()

    _end(table, _each([(conversion.source, conversion) for conversion in conversions], convert))


def info(files: Inspected, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Check `.hpcm` files and checkpoints, and say what they hold.

    The model of a coded file is named where it is a bundled one, or one of those in --runs.
    """
    from pipeline.commands.checkpoint_info import CheckpointInfo, is_checkpoint
    from pipeline.commands.display import show, show_json

    found: list[dict[str, Any]] = []
    checkpoints = [path for path in files if is_checkpoint(path)]
    coded = [path for path in files if path not in checkpoints]
    complete = True
    if coded:
        table, complete = _coded_info(coded, runs, found)
        if not as_json:
            show(*[table] if table.rows else [])
    for path in checkpoints:
        checkpoint = CheckpointInfo.read(path)
        found.append(checkpoint.to_json())
        if not as_json:
            show(checkpoint.table())
    if as_json:
        show_json(found)
    if not complete:
        raise typer.Exit(1)


def _coded_info(files: list[Path], runs: Path, found: list[dict[str, Any]]) -> tuple[Table, bool]:
    """A table of coded files, whose values are added to `found`, and whether all could be read."""
    from modules.bitstream import CodedImage
    from pipeline.commands.checkpoint_info import known_models
    from pipeline.evaluation.codec_files import SUFFIX, find

    table = Table("", ("file", "W×H", "file bits/pixel", "y", "z", "ICC bytes", "model"))
    names = known_models(runs)

    def describe(item: tuple[str, Path]) -> Iterable[str]:
        name, path = item
        coded = CodedImage.read(path)
        size, identity = path.stat().st_size, coded.identity.hex()
        bpp = 8 * size / (coded.width * coded.height)
        lengths = {"y": len(coded.y), "z": len(coded.z), "icc": len(coded.icc_profile)}
        model = f"{identity} ({names[identity]})" if identity in names else identity
        table.add(name, f"{coded.width}×{coded.height}", f"{bpp:.4f}", *map(str, lengths.values()), model)
        sizes = {"width": coded.width, "height": coded.height, "bytes": size, "bpp": bpp, "lengths": lengths}
        found.append({"file": str(path), **sizes, "model": identity, "checkpoint": names.get(identity)})
        return ()

    return table, _each([(path, (name, path)) for name, path in find(files, (SUFFIX,))], describe)


def _check_codec(codec: ImageCodec, file: Path, runs: Path) -> None:
    """Raise DataError where a coded file needs another codec whose name is known."""
    from modules.bitstream import CodedImage
    from pipeline.commands.checkpoint_info import known_models
    from pipeline.data.images import DataError

    identity = CodedImage.read(file).identity
    if identity != codec.identity:
        name = known_models(runs).get(identity.hex())
        if name:
            raise DataError(f"{file}: made by another model, which is known: {name}; give it with -c")


def evaluate(
    pictures: Pictures,
    checkpoint: Checkpoint = SHIPPED,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Encode and decode images for real: bits, PSNR, MS-SSIM and times, of each and on average.

    The bits are those of the coded latents, without an `.hpcm` file's header and ICC profile.

    The JSON has the layout of CompressAI's eval_model; `python -m compressai.utils.plot -f` draws it.
    """
    from pipeline.commands.checkpoint_info import checkpoint_file
    from pipeline.commands.display import show_json
    from pipeline.common.files import write_json
    from pipeline.data.images import SUFFIXES, read_picture
    from pipeline.evaluation.codec_files import find, to_tensor
    from pipeline.evaluation.coding import Evaluation, code
    from pipeline.weights.metadata import read_metadata

    _speak(not quiet)
    checkpoint = checkpoint_file(checkpoint)
    found = find(pictures, SUFFIXES)
    if output:
        if output.is_dir():
            raise typer.BadParameter(f"{output}: a folder; give the JSON file to write")
        output.parent.mkdir(parents=True, exist_ok=True)  # Before the work: it may not be allowed.
    model = _codec(checkpoint, device).model
    results: list[ImageResult] = []

    def measure(item: tuple[str, Path]) -> Iterable[str]:
        name, path = item
        picture = read_picture(path)
        results.append(code(model, name, to_tensor(picture), lmbda=0.0, metric="mse")[0])
        return picture.changes

    complete = _each([(path, (name, path)) for name, path in found], measure)
    table = Table("", ("image", "bits/pixel", "estimated", "PSNR dB", "MS-SSIM", "encode s", "decode s"))
    if results:
        evaluation = Evaluation(tuple(results))
        for result in (*results, evaluation.mean):
            table.add(*_cells(result))
        values = evaluation.to_json(str(read_metadata(checkpoint).get("name", checkpoint.stem)))
        if output:
            write_json(output, values)
        if as_json:
            show_json(values)
    _end(Table("", ()) if as_json else table, complete)


def bench_codec(
    preset: Annotated[str, typer.Option(help="base, large, phi-context or tiny; untrained.")] = "base",
    phase: Annotated[int, typer.Option(help="0 (Baseline) to 4.")] = 0,
    size: Annotated[str, typer.Option(help="Image size, HEIGHTxWIDTH.")] = "512x768",
    rounds: Annotated[int, typer.Option(min=0, help="Times to measure; 0 for memory alone.")] = 5,
    device: Device = "cpu",
) -> None:
    """Measure encoding and decoding against the matrix products in them alone, and peak memory."""
    import torch

    from modules import HPCM
    from pipeline.commands.display import show
    from pipeline.evidence import bench_codec

    pixels = size_of(size)
    torch.manual_seed(0)
    try:
        model = HPCM.from_preset(preset, phase).eval()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    model.update()
    results = bench_codec.bench_codec(model.to(device_of(device)), pixels, rounds)
    where = f"{pixels[0]}×{pixels[1]} pixels on {device}, {torch.get_num_threads()} threads"
    show(bench_codec.results_table(results, where))


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to the command line, and the measurement to its own."""
    for command in (compress, decompress, info, evaluate):
        app.command()(command)
    bench.command("codec")(bench_codec)


def _codec(checkpoint: Path, device: str) -> ImageCodec:
    from modules.bitstream import ImageCodec
    from pipeline.commands.checkpoint_info import checkpoint_file
    from pipeline.weights.checkpoints import load_codec

    return ImageCodec(load_codec(checkpoint_file(checkpoint)).to(device_of(device)))


def _each(items: Sequence[tuple[Path, Item]], work: Callable[[Item], Iterable[str]]) -> bool:
    """Do `work` on every item and print the messages it returns, after the item's path.

    A failure is printed, and the rest goes on; returns whether there was none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from modules.rans import BitstreamError
    from pipeline.commands.display import console, errors

    complete = True
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = errors.is_terminal and not errors.quiet
    with Progress(
        *columns, console=errors, transient=True, disable=not shown, redirect_stdout=console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(items))
        for path, item in items:
            bar.update(task, description=path.name)
            try:
                for message in work(item):
                    console.print(f"{path}: {message}", soft_wrap=True)
            except (BitstreamError, UserError, OSError) as error:
                complete = False
                reason = str(error).removeprefix(f"{path}: ").splitlines()[0]
                print(f"error: {path}: {reason}", file=sys.stderr)
            bar.advance(task)
    return complete


def _speak(wanted: bool) -> None:
    if not wanted:
        from pipeline.commands.display import hush

        hush()


def _cells(result: ImageResult) -> list[str]:
    quality = result.quality
    return [
        result.name,
        f"{quality.bpp:.4f}",
        f"{result.estimated_bpp:.4f}",
        f"{quality.psnr_db:.2f}",
        number(quality.ms_ssim),
        f"{result.encode_seconds:.2f}",
        f"{result.decode_seconds:.2f}",
    ]


def _end(table: Table, complete: bool) -> None:
    from pipeline.commands.display import show

    if table.rows:
        show(table)
    if not complete:
        raise typer.Exit(1)
