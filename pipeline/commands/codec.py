"""The commands that use a codec: `hpcm compress`, `decompress`, `info`, `verify`, `evaluate` and `bench codec`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pipeline.commands.options import Device, device_of, size_of
from pipeline.common.errors import UserError
from pipeline.common.tables import Table, number

if TYPE_CHECKING:
    from rich.console import Console

    from modules.bitstream import ImageCodec
    from pipeline.evaluation.codec_files import Conversion
    from pipeline.evaluation.coding import ImageResult

Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="The codec: a stage's checkpoint.safetensors [default: a bundled one]."),
]
Pictures = Annotated[list[Path], typer.Argument(help="Images, and folders of them.")]
Coded = Annotated[list[Path], typer.Argument(help="`.hpcm` files, and folders of them.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File or folder to write [default: beside].")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Item = TypeVar("Item")


def compress(
    pictures: Pictures,
    checkpoint: Checkpoint = None,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    quality: Annotated[
        int | None,
        typer.Option(help="Bundled codec: from 1, the smallest files, up [default: the middle one].", min=1),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Relative error of a decoder's scales that the file allows for; 0: none [default: 2e-5]."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode each file again before it is written.")
    ] = True,
) -> None:
    """Code images as `.hpcm` files. Each is decoded again before it is written, which gives its PSNR.

    Images are stored the right way up (EXIF) and with their ICC profile. Transparency is laid on white and 16 bits
    a channel become 8, with a message.
    """
    from modules.guards import EPSILON, check_epsilon
    from pipeline.evaluation import codec_files

    if checkpoint and quality:
        raise typer.BadParameter("--quality chooses a bundled codec; give it or --checkpoint, not both")
    try:
        chosen = check_epsilon(EPSILON if epsilon is None else epsilon)
    except ValueError as error:
        raise typer.BadParameter(f"--epsilon: {error}") from error
    conversions = codec_files.plan(pictures, output, codec_files.COMPRESSION, overwrite)
    codec = _codec(checkpoint, device, quality)
    table = Table("", ("file", "W×H", "bytes", "file bits/pixel", "PSNR dB", "encode s", "decode s"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = codec_files.compress_file(codec, conversion, chosen, verify)
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

    _end(table, _each([(conversion.source, conversion) for conversion in conversions], convert))


def decompress(
    files: Coded,
    checkpoint: Checkpoint = None,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
) -> None:
    """Decode `.hpcm` files to PNG, or to the format of the name given with --output: all but JPEG keep every bit.

    Of the bundled codecs each file finds its own.
    """
    from pipeline.evaluation import codec_files
    from pipeline.weights.shipped import ShippedCodecs

    conversions = codec_files.plan(files, output, codec_files.DECOMPRESSION, overwrite)
    given = _codec(checkpoint, device) if checkpoint else None
    codec_of = (lambda _: given) if given else ShippedCodecs(str(device_of(device))).of
    table = Table("", ("file", "W×H"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = codec_files.decompress_file(codec_of, conversion)
        table.add(conversion.name, f"{done.width}×{done.height}")
        return [done.recovery] if done.recovery else []

    _end(table, _each([(conversion.source, conversion) for conversion in conversions], convert))


def info(files: Coded) -> None:
    """Check `.hpcm` files and say what they hold. Needs no checkpoint."""
    from modules.bitstream import CodedImage
    from pipeline.evaluation.codec_files import SUFFIX, find

    columns = ("file", "W×H", "file bits/pixel", "y", "z", "ICC bytes", "ε", "guard bytes", "model")
    table = Table("", columns)

    def describe(item: tuple[str, Path]) -> Iterable[str]:
        name, path = item
        coded = CodedImage.read(path)
        bpp = 8 * path.stat().st_size / (coded.width * coded.height)
        lengths = (str(len(part)) for part in (coded.y, coded.z, coded.icc_profile))
        guards = coded.guards
        guarded = (f"{guards.epsilon:.1g}", str(guards.guard_bytes)) if guards else ("–", "–")
        table.add(name, f"{coded.width}×{coded.height}", f"{bpp:.4f}", *lengths, *guarded, coded.identity.hex())
        return () if guards else ["version 1: decodes where it was written"]

    _end(table, _each([(path, (name, path)) for name, path in find(files, (SUFFIX,))], describe))


def verify(device: Device = "cpu") -> None:
    """Check that this machine reads what others write: decode the streams of the conformance suite and compare.

    Exits 1 where a stream's symbols are not those of its reference, which was computed in float64.
    """
    import torch

    from pipeline.common.timing import machine
    from pipeline.evaluation import conformance

    chosen = device_of(device)
    columns = ("stream", "W×H", "ε", "guard bytes", "largest scale error", "values ±1", "")
    table = Table("", columns)
    outcomes = []
    for outcome in conformance.verify(chosen):
        outcomes.append(outcome)
        height, width = outcome.size
        guards = f"{outcome.epsilon:.1g}", str(outcome.guard_bytes)
        values = "–" if outcome.pixels is None else str(outcome.pixels)
        mark = "FAIL" if outcome.fault else "pass"
        table.add(outcome.name, f"{width}×{height}", *guards, number(outcome.scale_error, ".1e"), values, mark)
    failed = [outcome for outcome in outcomes if outcome.fault]
    for outcome in failed:
        print(f"error: {outcome.name}: {outcome.fault}", file=sys.stderr)
    console = _console()
    console.print(table.rich())
    console.print(f"{machine(device)}; PyTorch {torch.__version__}; {torch.backends.cpu.get_cpu_capability()}")
    worst = max((outcome.scale_error / outcome.epsilon for outcome in outcomes if outcome.scale_error), default=0.0)
    result = f"{len(failed)} of {len(outcomes)} streams failed" if failed else f"pass: {len(outcomes)} streams"
    console.print(f"{result}; the largest scale error is {worst:.0%} of its stream's ε")
    if failed:
        raise typer.Exit(1)


def evaluate(
    pictures: Pictures,
    checkpoint: Checkpoint = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    device: Device = "cpu",
) -> None:
    """Encode and decode images for real: bits, PSNR, MS-SSIM and times, of each and on average.

    The bits are those of the coded latents, without an `.hpcm` file's header and ICC profile.

    The JSON has the layout of CompressAI's eval_model; `python -m compressai.utils.plot -f` draws it.
    """
    from pipeline.common.files import write_json
    from pipeline.data.images import SUFFIXES, read_picture
    from pipeline.evaluation.codec_files import find, to_tensor
    from pipeline.evaluation.coding import Evaluation, code
    from pipeline.weights.checkpoints import read_metadata
    from pipeline.weights.shipped import of_quality

    checkpoint = checkpoint or of_quality(None)
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
        if output:
            write_json(output, evaluation.to_json(str(read_metadata(checkpoint).get("name", checkpoint.stem))))
    _end(table, complete)


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
    from pipeline.evidence import bench_codec

    pixels = size_of(size)
    torch.manual_seed(0)
    try:
        model = HPCM.from_preset(preset, phase).eval()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    model.update()
    bench_codec.bench_codec(model.to(device_of(device)), pixels, rounds)


def register(app: typer.Typer, bench: typer.Typer) -> None:
    """Add the commands to the command line, and the measurement to its own."""
    for command in (compress, decompress, info, verify, evaluate):
        app.command()(command)
    bench.command("codec")(bench_codec)


def _codec(checkpoint: Path | None, device: str, quality: int | None = None) -> ImageCodec:
    """The codec of a checkpoint, or of a quality of the bundled ones."""
    from modules.bitstream import ImageCodec
    from pipeline.weights.checkpoints import load_codec
    from pipeline.weights.shipped import of_quality

    return ImageCodec(load_codec(checkpoint or of_quality(quality)).to(device_of(device)))


def _each(items: Sequence[tuple[Path, Item]], work: Callable[[Item], Iterable[str]]) -> bool:
    """Do `work` on every item and print the messages it returns, after the item's path.

    A failure is printed, and the rest goes on; returns whether there was none.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from modules.rans import BitstreamError

    console, complete = _console(), True
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
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


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)


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
    if table.rows:
        _console().print(table.rich())
    if not complete:
        raise typer.Exit(1)
