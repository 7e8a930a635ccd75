"""The options of commands that code images, and the codec that they choose."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from modules import HPCM
from modules.bitstream.file_format import BitstreamError
from modules.image_codec import ImageCodec
from modules.refinement import ITERATIONS
from pipeline.commands.checkpoint_info import codec_path, known_codecs, name_of
from pipeline.commands.devices import device_of
from pipeline.commands.display import errors
from pipeline.commands.options import Device, Quiet
from pipeline.common.errors import raised_as
from pipeline.evaluation.conversions import Conversion, plan
from pipeline.weights.checkpoints import load_codec
from pipeline.weights.shipped import DEFAULT

Pictures = Annotated[list[Path], typer.Argument(help="Images and folders of images; `-`: standard input.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File or folder to write; `-`: standard output [default: beside the input]."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        help="Largest number of pixels of an image, padding included [default: what fits into half of the memory].",
    ),
]


Effort = Annotated[
    int,
    typer.Option(
        "--effort",
        min=0,
        max=len(ITERATIONS) - 1,
        help="Refine what is coded of each image, for smaller files: 1 to 4 are 5, 10, 30 and 100 iterations. With the "
        "bundled codecs, each takes 2.5 s of processor time a megapixel.",
    ),
]
Lmbda = Annotated[
    float | None,
    typer.Option(
        "--lmbda",
        min=1e-9,
        max=1e9,
        help="λ of the loss that --effort lowers, bpp + λ·255²·MSE [default: the codec's].",
    ),
]


def quality_option(default: str) -> Any:
    """The option --quality, with its default in words."""
    return typer.Option(
        "--quality",
        min=1,
        help="From 1, which gives the smallest files, to the number of the codec's rates, which is 4 for the bundled "
        f"codec. Fractions are allowed. [default: {default}]",
        show_default=False,
    )


def load_at(checkpoint: Path | None, quality: float | None, device: str) -> HPCM:
    """Load a codec, by default the bundled one of every rate; it codes at the quality, or at its own for None."""
    model = load_codec(checkpoint or DEFAULT).to(device_of(device))
    if quality is not None:
        with raised_as(typer.BadParameter, prefix="--quality: "):
            model.check_quality(quality)
        model.quality = quality
    return model


def set_lmbda(model: HPCM, lmbda: float | None, refines: bool) -> None:
    """Set a codec's λ; None keeps its own. Raises BadParameter if a refinement needs a λ and there is none."""
    if model.config.rates:
        if lmbda is not None:
            raise typer.BadParameter(
                "--lmbda: a codec of several rates refines for the λ of its quality; give --quality"
            )
        return
    model.lmbda = model.lmbda if lmbda is None else lmbda
    if refines and model.lmbda is None:
        raise typer.BadParameter(
            "refinement needs the λ that the codec was trained for, and the checkpoint does not name it; give --lmbda"
        )


@dataclass(frozen=True)
class CodecOptions:
    """A codec, and what it may do."""

    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", "-c", parser=codec_path, metavar="CODEC")] = None
    """The codec [default: the bundled codec of every rate]; `hpcm info --help` lists its forms."""
    overwrite: bool = False
    """Replace existing files."""
    skip_existing: bool = False
    """Skip files whose output file exists."""
    device: Device = "cpu"
    max_pixels: MaxPixels = None
    quiet: Quiet = False

    def model(self, quality: float | None = None) -> HPCM:
        """The codec, which then codes at the quality; None takes the codec's own."""
        return load_at(self.checkpoint, quality, self.device)

    def plan(self, sources: list[Path], output: Path | None, kind: tuple[tuple[str, ...], str]) -> list[Conversion]:
        """The conversions of a kind that are left to do. Raises DataError."""
        found = plan(sources, output, kind, self.overwrite or self.skip_existing)
        left = [item for item in found if not (self.skip_existing and item.target.exists())]
        if len(left) < len(found):
            errors.print(f"skipped: {len(found) - len(left)} of {len(found)}, because their files exist")
        return left

    def finder(self, runs: Path) -> Callable[[bytes], ImageCodec]:
        """A function from the identity in a coded file to its codec: the checkpoint's, or a bundled one, or in `runs`.

        The function raises BitstreamError, which names the codec that made the file if it is known.
        """
        given = ImageCodec(self.model()) if self.checkpoint else None
        known, loaded = known_codecs(runs), {given.identity: given} if given else {}

        def find(identity: bytes) -> ImageCodec:
            if identity in loaded:
                return loaded[identity]
            name, path = identity.hex(), known.get(identity.hex())
            if path is None:
                raise BitstreamError(f"made by another model: {name}, not bundled and not in {runs}; give it with -c")
            if given is not None:
                raise BitstreamError(f"made by another model: {name_of(path)}; give that model with -c, or no -c")
            loaded[identity] = ImageCodec(load_codec(path).to(device_of(self.device)))
            return loaded[identity]

        return find
