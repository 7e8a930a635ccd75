"""Compares our codecs with Pillow's at equal file sizes, and with these and published curves over rates."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from modules.bitstream.file_format import CodedImage
from modules.image_codec import ImageCodec
from pipeline.common.tables import Table, number
from pipeline.evaluation.codec_files import to_8_bits
from pipeline.evaluation.metrics import NamedImage, quality_of
from pipeline.evaluation.pillow_codecs import PillowCodec, PillowFiles
from pipeline.evaluation.rd_curves import Curve, bd_rate, bd_rate_ms_ssim, draw_curves
from pipeline.evaluation.results import cells, mean_quality
from pipeline.weights.published import Quality

SWEPT = (1, 3, 5, 8, 12, 16, 20, 25, 30, 40, 50, 60, 70, 80, 90, 95)
"""The qualities at which the curve of a codec is measured."""
ROOM = 1.5
"""Curves end at this many times the largest rate of our codecs."""


@dataclass(frozen=True)
class Measured:
    """A codec's mean quality over the images; `bpp` counts whole files."""

    codec: str
    quality: Quality


@dataclass(frozen=True)
class OperatingPoint:
    """One of our codecs, and the other codecs at its file sizes."""

    name: str
    ours: Quality
    others: tuple[Measured, ...]


@dataclass(frozen=True)
class CodecComparison:
    """Operating points in the order of their rates, and the curve of each other codec over its qualities."""

    images: int
    points: tuple[OperatingPoint, ...]
    curves: dict[str, tuple[Quality, ...]]
    published: dict[str, tuple[Quality, ...]] = field(default_factory=dict)
    """Curves that were not measured here, by title."""


class CodecComparer:
    """Codes images with our codecs, by name, and with Pillow's; with `curves`, with these over their qualities as well.

    It keeps neither the images nor their files.
    """

    def __init__(self, ours: Sequence[tuple[str, ImageCodec]], against: Sequence[PillowCodec], curves: bool):
        self.ours, self.against, self.curves = ours, against, curves
        self._at_sizes: list[list[list[Quality]]] = []  # by image and our codec, with that codec first
        self._swept: list[list[list[Quality]]] = []  # by image and other codec, with all its qualities

    def add(self, named: NamedImage) -> None:
        """Code an image with each of our codecs, and with the others at the sizes of its files."""
        files = [PillowFiles(codec, named) for codec in self.against]
        coded = [_coded(codec, named) for _, codec in self.ours]
        at_sizes = [[quality, *(file.measure(file.nearest(size)) for file in files)] for quality, size in coded]
        self._swept.append([[file.measure(quality) for quality in SWEPT] for file in files if self.curves])
        self._at_sizes.append(at_sizes)

    def comparison(self) -> CodecComparison | None:
        """The means over the images, with the points in the order of their rates; None without images."""
        if not self._at_sizes:
            return None
        titles = [codec.title for codec in self.against]
        points = [
            OperatingPoint(name, ours, tuple(map(Measured, titles, others)))
            for (name, _), (ours, *others) in zip(self.ours, _means(self._at_sizes), strict=True)
        ]
        ordered = sorted(points, key=lambda point: point.ours.bpp)
        curves = dict(zip(titles, _means(self._swept), strict=False))
        limit = ROOM * ordered[-1].ours.bpp
        kept = {title: tuple(q for q in curve if q.bpp <= limit) for title, curve in curves.items()}
        return CodecComparison(len(self._at_sizes), tuple(ordered), kept)


def _means(of_images: list[list[list[Quality]]]) -> list[list[Quality]]:
    """The means over images that have equal rows of qualities."""
    return [[mean_quality(qualities) for qualities in zip(*rows, strict=True)] for rows in zip(*of_images, strict=True)]


def _coded(codec: ImageCodec, named: NamedImage) -> tuple[Quality, int]:
    """Quality of one image by one of our codecs, and the bytes of its file."""
    device = codec.model.means_hyper.device
    data = codec.encode(named[1].to(device)).pack()
    x_hat = to_8_bits(codec.decode(CodedImage.parse(data)).x_hat.cpu()) / 255
    height, width = named[1].shape[2:]
    return quality_of(named, x_hat, 8 * len(data) / (height * width), 0.0, "mse"), len(data)


def table(comparison: CodecComparison) -> Table:
    """A table of the operating points. Each has our codec first, then the other codecs at its file sizes."""
    title = f"Whole files, mean of {comparison.images} images; other codecs at the quality nearest in file size"
    found = Table(title, ("codec", "file bpp", "PSNR dB", "MS-SSIM"))
    for place, point in enumerate(comparison.points):
        if place:
            found.add("", "", "", "")
        for name, quality in ((point.name, point.ours), *((other.codec, other.quality) for other in point.others)):
            found.add(name, *cells(quality)[:3])
    return found


def deltas_table(comparison: CodecComparison) -> Table:
    """The rate of our codecs relative to each curve, at equal quality."""
    title = "BD-rate of our codecs in per cent, by pchip (–: fewer than two points, no overlap, or not monotone)"
    found = Table(title, ("against", "points", "at equal PSNR", "at equal MS-SSIM"))
    ours = [point.ours for point in comparison.points]
    for name, curve in (comparison.curves | comparison.published).items():
        values = bd_rate(ours, curve), bd_rate_ms_ssim(ours, curve)
        found.add(name, str(len(curve)), *(number(value, "+.2f") for value in values))
    return found


def draw(comparison: CodecComparison) -> Figure:
    """PSNR and, if known, MS-SSIM over rate: curves of the others, and our points."""
    shown: dict[str, tuple[Curve, dict[str, Any]]] = {
        title: (curve, {"linewidth": 1.3}) for title, curve in comparison.curves.items()
    }
    shown |= {name: (curve, {"linestyle": ":", "marker": "x"}) for name, curve in comparison.published.items()}
    ours = [point.ours for point in comparison.points]
    shown["HPCM, this project"] = ours, {"color": "#111111", "marker": "o", "markersize": 5}
    similar = all(quality.ms_ssim is not None for quality in ours)
    return draw_curves(shown, similar, "rate of whole files in bits per pixel", columns=4)
