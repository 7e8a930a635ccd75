"""The commands that use a codec: `hpcm compress`, `decompress`, `verify` and `bench codec`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.each_file import each_file
from pipeline.commands.info import info
from pipeline.commands.options import USE, Device, Quiet, Runs, device_of, size_of
from pipeline.commands.streams import with_standard_streams
from pipeline.common.tables import Table, number

if TYPE_CHECKING:
    from modules.image_codec import ImageCodec
    from pipeline.evaluation.conversions import Conversion

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        "-c",
        help="The codec: a stage's checkpoint.safetensors or the stage's folder [default: a bundled codec].",
    ),
]
Pictures = Annotated[list[Path], typer.Argument(help="Images and folders of images; `-`: standard input.")]
Coded = Annotated[list[Path], typer.Argument(help="`.hpcm` files and folders of them; `-`: standard input.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File or folder to write; `-`: standard output [default: beside the input]."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        help="Largest number of pixels of an image, padding included [default: what fits into half of the memory].",
    ),
]


@with_standard_streams("pictures", ".hpcm")
def compress(
    pictures: Pictures,
    checkpoint: Checkpoint = None,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    max_pixels: MaxPixels = None,
    quality: Annotated[
        int | None,
        typer.Option(help="Bundled codec by quality; 1 gives the smallest files [default: the middle one].", min=1),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Relative error in a decoder's scales that the file tolerates; 0: none [default: 2e-5]."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode each file before writing it, to check it.")
    ] = True,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip images whose output file exists.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compress images to `.hpcm` files. Each file is decoded before it is written, to check it and to measure PSNR.

    The EXIF orientation is applied and the ICC profile is kept. Transparent images are blended with white, and 16 bits
    per channel are reduced to 8; a message says so.
    """
    from modules.bitstream.file_format import EPSILON, check_epsilon
    from pipeline.commands.display import console
    from pipeline.evaluation.conversions import COMPRESSION, plan

    if checkpoint and quality:
        raise typer.BadParameter("--quality selects a bundled codec: give --quality or --checkpoint, not both")
    try:
        chosen = check_epsilon(EPSILON if epsilon is None else epsilon)
    except ValueError as error:
        raise typer.BadParameter(f"--epsilon: {error}") from error
    _speak(not quiet)
    conversions = plan(pictures, output, COMPRESSION, overwrite or skip_existing)
    if skip_existing:
        found, conversions = conversions, [item for item in conversions if not item.target.exists()]
        if skipped := len(found) - len(conversions):
            console.print(f"skipped: {skipped} of {len(found)}, because their files exist")
        if not conversions:
            return

    # PyTorch takes seconds to import. Mistakes in the arguments are reported before that.
    from pipeline.evaluation.codec_files import compress_file

    codec = _codec(checkpoint, device, quality)
    table = Table("", ("file", "W×H", "bytes", "file bits/pixel", "PSNR dB", "encode s", "decode s"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = compress_file(codec, conversion, chosen, verify, max_pixels)
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

    _end(table, each_file([(conversion.source, conversion) for conversion in conversions], convert))


@with_standard_streams("files", ".png")
def decompress(
    files: Coded,
    checkpoint: Checkpoint = None,
    output: Output = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    max_pixels: MaxPixels = None,
    runs: Runs = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Decode `.hpcm` files to PNG, or to the format of the --output file's suffix. All formats but JPEG are lossless.

    Without --checkpoint, each file is decoded by the bundled codec that made it.
    """
    from pipeline.evaluation.conversions import DECOMPRESSION, plan

    _speak(not quiet)
    conversions = plan(files, output, DECOMPRESSION, overwrite)

    from pipeline.evaluation.codec_files import decompress_file

    codec_of = _codec_finder(checkpoint, device, runs)
    table = Table("", ("file", "W×H"))

    def convert(conversion: Conversion) -> Iterable[str]:
        done = decompress_file(codec_of, conversion, max_pixels)
        table.add(conversion.name, f"{done.width}×{done.height}")
        return [done.recovery] if done.recovery else []

    _end(table, each_file([(conversion.source, conversion) for conversion in conversions], convert))


def _codec_finder(checkpoint: Path | None, device: str, runs: Path) -> Callable[[bytes], ImageCodec]:
    """Return a function from the identity in a coded file to its codec: `checkpoint`'s, or a bundled one.

    The function raises DataError, which names the path, if a codec in `runs` made the file instead, and BitstreamError
    if the codec is not known.
    """
    from modules.bitstream.file_format import BitstreamError
    from pipeline.commands.checkpoint_info import known_models
    from pipeline.data.images import DataError
    from pipeline.weights.shipped import ShippedCodecs

    given = _codec(checkpoint, device) if checkpoint else None
    shipped = ShippedCodecs(str(device_of(device)))

    def find(identity: bytes) -> ImageCodec:
        if given is not None and identity == given.identity:
            return given
        try:
            if given is None:
                return shipped.of(identity)
            raise BitstreamError(f"made by another model: {identity.hex()}; that of -c is {given.identity.hex()}")
        except BitstreamError as error:
            name = known_models(runs).get(identity.hex())
            if name is None:
                raise
            raise DataError(f"made by another model: {name}; give that model with -c") from error

    return find


def verify(device: Device = "cpu") -> None:
    """Check that this machine decodes files from other machines: decode the streams of the conformance suite.

    Exits 1 if a stream's symbols differ from its reference, which was computed in float64.
    """
    import torch

    from pipeline.commands.display import console, show
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
    show(table)
    console.print(f"{machine(device)}; PyTorch {torch.__version__}; {torch.backends.cpu.get_cpu_capability()}")
    worst = max((outcome.scale_error / outcome.epsilon for outcome in outcomes if outcome.scale_error), default=0.0)
    result = f"{len(failed)} of {len(outcomes)} streams failed" if failed else f"pass: {len(outcomes)} streams"
    console.print(f"{result}; the largest scale error is {worst:.0%} of its stream's ε")
    if failed:
        raise typer.Exit(1)


def bench_codec(
    preset: Annotated[str, typer.Option(help="base, large, phi-context or tiny, untrained.")] = "base",
    phase: Annotated[int, typer.Option(help="Phase, from 0 (Baseline) to 4.")] = 0,
    size: Annotated[str, typer.Option(help="Image size, HEIGHTxWIDTH.")] = "512x768",
    rounds: Annotated[int, typer.Option(min=0, help="Number of measurements; 0: only memory.")] = 5,
    device: Device = "cpu",
) -> None:
    """Measure peak memory and the times of encoding and decoding, compared with their matrix products alone."""
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
    """Add the commands to the command line, and `bench codec` to `bench`."""
    for command in (compress, decompress, info, verify):
        app.command(rich_help_panel=USE)(command)
    bench.command("codec")(bench_codec)


def _codec(checkpoint: Path | None, device: str, quality: int | None = None) -> ImageCodec:
    """The codec of a checkpoint, or the bundled codec of a quality."""
    from modules.image_codec import ImageCodec
    from pipeline.commands.checkpoint_info import checkpoint_file
    from pipeline.weights.checkpoints import load_codec
    from pipeline.weights.shipped import of_quality

    return ImageCodec(
        load_codec(checkpoint_file(checkpoint) if checkpoint else of_quality(quality)).to(device_of(device))
    )


def _speak(wanted: bool) -> None:
    if not wanted:
        from pipeline.commands.display import hush

        hush()


def _end(table: Table, complete: bool) -> None:
    from pipeline.commands.display import show

    if table.rows:
        show(table)
    if not complete:
        raise typer.Exit(1)
