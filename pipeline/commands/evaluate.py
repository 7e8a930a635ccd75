"""`hpcm evaluate`: the rate and quality of codecs on images, alone or against JPEG, WebP and AVIF."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from modules import HPCM
from modules.image_codec import ImageCodec
from pipeline.commands.checkpoint_info import codec_path
from pipeline.commands.codec_options import Effort, Lmbda, MaxPixels, Pictures, load_at, quality_option, set_lmbda
from pipeline.commands.display import errors, show, show_json
from pipeline.commands.each_file import Refinement, each_file
from pipeline.commands.options import AsJson, Device, Quiet
from pipeline.commands.streams import from_standard_input
from pipeline.common.errors import UserError
from pipeline.common.figure_style import save
from pipeline.common.files import write_json
from pipeline.common.tables import Table, shortest
from pipeline.data.pictures import SUFFIXES
from pipeline.evaluation.codec_files import read_to_code
from pipeline.evaluation.coding import code
from pipeline.evaluation.conversions import find
from pipeline.evaluation.metrics import NamedImage
from pipeline.evaluation.pillow_codecs import CODECS, PillowCodec, codecs_named
from pipeline.evaluation.rd_curves import PUBLISHED, is_kodak, read_curve
from pipeline.evaluation.results import Evaluation, ImageResult, cells
from pipeline.evidence import codec_comparison
from pipeline.weights.published import Quality
from pipeline.weights.shipped import DEFAULT

Outcome = tuple[dict[str, object], list[Table], bool]
"""The values for JSON, the tables, and whether all images succeeded."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The codecs, and where they compute."""

    checkpoint: Annotated[list[Path] | None, typer.Option("--checkpoint", "-c", parser=codec_path, metavar="CODEC")] = (
        None
    )
    """The codec; with --against, repeatable [default: the bundled codec of every rate]. `hpcm info --help` lists the
    forms of a codec."""
    quality: Annotated[float | None, quality_option("every rate of the codec, by its means")] = None
    against: str | None = None
    """Compare with these, separated by commas: codecs at equal file sizes (`jpeg`, `webp`, `avif`), the published
    curves `hpcm-base-kodak` and `hpcm-large-kodak`, and files with a curve, as CSV or CompressAI's JSON."""
    plot: Path | None = None
    """With --against: draw rate–distortion curves to this PNG."""
    effort: Effort = 0
    lmbda: Lmbda = None
    device: Device = "cpu"
    max_pixels: MaxPixels = None

    def check(self) -> None:
        """Raise BadParameter for options that cannot be used together."""
        if self.plot and not self.against:
            raise typer.BadParameter("--plot draws curves of several codecs: give --against as well")
        if self.quality and self.against:
            raise typer.BadParameter("--against compares curves, which need every rate: leave out --quality")
        if not self.against and len(self.checkpoint or ()) > 1:
            raise typer.BadParameter("several checkpoints are compared only with --against")

    def load(self, file: Path) -> HPCM:
        """Load a codec on the chosen device."""
        model = load_at(file, self.quality, self.device)
        set_lmbda(model, self.lmbda, self.effort > 0)
        return model

    def each_image(
        self,
        pictures: list[Path],
        models: Sequence[HPCM],
        measure: Callable[[NamedImage], None],
        refinement: Refinement,
    ) -> bool:
        """Measure every image that is small enough for the models. Returns whether all succeeded."""

        def work(item: tuple[str, Path]) -> Iterable[str]:
            name, path = item
            picture, image = read_to_code(path, self.max_pixels, *models, refined=self.effort > 0)
            measure((name, image))
            return picture.changes

        return each_file([(path, (name, path)) for name, path in find(pictures, SUFFIXES)], work, refinement)


def evaluate(
    pictures: Pictures,
    options: EvaluationOptions,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Encode images to bitstreams and decode them. Print bits, PSNR, MS-SSIM and times of each image, and the means.

    The bits are those of the coded latents. The header and the ICC profile of an `.hpcm` file are not counted.

    The JSON has the layout of CompressAI's eval_model; `python -m compressai.utils.plot -f` plots it.

    With --against, the bits are those of whole files. Pillow encodes each image at the quality that gives the file
    nearest in size to our codec's file. BD-rate against each curve is printed, for two or more checkpoints.
    """
    options.check()
    for path in filter(None, (output, options.plot)):
        if path.is_dir():
            raise typer.BadParameter(f"{path} is a folder; give the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)  # Fail before the work if it cannot be written.
    with from_standard_input(pictures) as files:
        values, tables, complete = (_against if options.against else _alone)(files, options)
    if output and values:
        write_json(output, values)
    if as_json and values:
        show_json(values)
    else:
        show(*(table for table in tables if table.rows))
    if not complete:
        raise typer.Exit(1)


def _alone(pictures: list[Path], options: EvaluationOptions) -> Outcome:
    """Evaluate one codec: each image, or the means at each of its rates."""
    file = options.checkpoint[0] if options.checkpoint else DEFAULT
    model = options.load(file)
    codecs = {"mean": model} if options.quality else dict(_at_each_rate(model)) or {"mean": model}
    results: dict[str, list[ImageResult]] = {name: [] for name in codecs}
    refinement = Refinement(completes=False)

    def measure(named: NamedImage) -> None:
        for rate, codec in codecs.items():
            result, _ = code(codec, named, 0.0, "mse", options.effort, refinement.go_on)
            results[rate].append(result)

    complete = options.each_image(pictures, [model], measure, refinement)
    evaluations = {rate: Evaluation(tuple(images)) for rate, images in results.items() if images}
    if not evaluations:
        return {}, [], complete
    means = [replace(evaluation.mean, name=rate) for rate, evaluation in evaluations.items()]
    first, *others = evaluations.values()
    of_images = first.images if not others else ()
    columns = ("coded bpp", "estimated bpp", "PSNR dB", "MS-SSIM", "encode s", "decode s")
    table = Table("", ("image" if of_images else "rate", *columns))
    for result in (*of_images, *means):
        bpp, psnr_db, ms_ssim, _ = cells(result.quality)
        seconds = f"{result.encode_seconds:.2f}", f"{result.decode_seconds:.2f}"
        table.add(result.name, bpp, f"{result.estimated_bpp:.4f}", psnr_db, ms_ssim, *seconds)
    return first.to_json(_name(model, file), *others), [table], complete


def _at_each_rate(model: HPCM) -> Iterator[tuple[str, HPCM]]:
    """A codec of several rates at each of them, by quality and λ; nothing for another codec."""
    for quality, lmbda in enumerate(model.config.rates, start=1):
        at_rate = copy.copy(model)  # It shares the weights.
        at_rate.quality = quality
        yield f"quality {quality}, λ = {shortest(lmbda)}", at_rate


def _against(pictures: list[Path], options: EvaluationOptions) -> Outcome:
    """Compare codecs with Pillow's and with published curves."""
    others, published = _named_references(options.against or "")
    for name in published:
        if name.endswith("-kodak") and not is_kodak(image for image, _ in find(pictures, SUFFIXES)):
            errors.print(f"{name}: measured on the 24 Kodak images, and these are others", soft_wrap=True)
    refinement = Refinement(completes=False)
    ours = [(name, ImageCodec(model, options.effort, refinement.go_on)) for name, model in _named_codecs(options)]
    comparer = codec_comparison.CodecComparer(ours, others, curves=options.plot is not None)
    complete = options.each_image(pictures, [codec.model for _, codec in ours], comparer.add, refinement)
    measured = comparer.comparison()
    if measured is None:
        return {}, [], complete
    found = replace(measured, published=published)
    if options.plot is not None:
        save(codec_comparison.draw(found), options.plot)
        errors.print(f"curves: {options.plot}", soft_wrap=True)
    return asdict(found), [codec_comparison.table(found), codec_comparison.deltas_table(found)], complete


def _named_references(names: str) -> tuple[list[PillowCodec], dict[str, tuple[Quality, ...]]]:
    """Pillow's codecs, and the curves that are published or in files. Raises UserError for unknown names."""
    codecs, curves = list[str](), dict[str, tuple[Quality, ...]]()
    for name in filter(None, map(str.strip, names.split(","))):
        if name in PUBLISHED:
            curves[name] = PUBLISHED[name]
        elif Path(name).suffix:
            curves |= dict([read_curve(Path(name))])
        else:
            codecs.append(name)
    if not codecs and not curves:
        raise UserError(f"--against {names}: expected some of {', '.join((*CODECS, *PUBLISHED))}, or a file of a curve")
    return codecs_named(codecs), curves


def _named_codecs(options: EvaluationOptions) -> list[tuple[str, HPCM]]:
    """The codecs at each of their rates, each with the name that tables show."""
    found = []
    for file in options.checkpoint or [DEFAULT]:
        model = options.load(file)
        if model.config.rates:
            found += [(f"{_name(model, file)}, {rate}", file, codec) for rate, codec in _at_each_rate(model)]
            continue
        trained = f", λ = {shortest(model.lineage['lmbda'])}" if "lmbda" in model.lineage else ""
        found.append((f"{_name(model, file)}{trained}", file, model))
    several = len({name for name, _, _ in found}) < len(found)
    return [(f"{name} ({file})" if several else name, model) for name, file, model in found]


def _name(model: HPCM, file: Path) -> str:
    """The name of a codec's stage, or of its file."""
    return model.lineage.get("name") or file.stem.removesuffix(".pth")
