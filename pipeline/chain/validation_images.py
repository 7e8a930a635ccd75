"""The validation images of a stage, and what a codec achieves on them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from torch import Tensor

from modules import HPCM
from pipeline.chain.context import RunContext
from pipeline.chain.stage_codec import StageError, codec_config
from pipeline.chain.stage_task import StageTask
from pipeline.common.fault_injection import fault
from pipeline.common.tables import shortest
from pipeline.data.crops import validation_images
from pipeline.data.images import find_images
from pipeline.data.pictures import DataError
from pipeline.evaluation.coding import estimate, evaluate
from pipeline.evaluation.limits import check_size
from pipeline.evaluation.metrics import NamedImage
from pipeline.evaluation.results import Evaluation
from pipeline.records.record import RateResult
from pipeline.weights.published import Quality, Validation


class ValidationImages:
    """Measures codecs on a stage's validation images. A signal stops the work between two images."""

    def __init__(self, task: StageTask, context: RunContext):
        self.task, self.stage, self.photos = task, task.stage, task.val_photos
        self.processes, self.watcher = context.processes, context.watcher

    @cached_property
    def images(self) -> list[NamedImage]:
        """The images that the codec can code. Raises DataError if they changed since their digest was taken."""
        sketch = HPCM.on_meta(codec_config(self.task))
        found = []
        for name, image in validation_images(self.photos, self.stage.evaluation.images):
            try:
                check_size(sketch, *image.shape[2:])
                found.append((name, image))
            except DataError as error:
                self.watcher.note(f"left out of validation: {name}: {error}")
        folder, runs = self.stage.data.val, self.task.chain_folder.parents[1]
        if folder and find_images(Path(folder), "val", 1, runs).digest != self.photos.digest:
            raise DataError(
                f"{self.photos.source}: the validation images changed during the run; run the same command again"
            )
        if not found:
            raise DataError(f"{self.photos.source}: all images are too large for validation; give smaller ones")
        return found

    @property
    def conditions(self) -> Validation:
        """The conditions of the measurements. Qualities under equal conditions can be compared."""
        images = tuple(name for name, _ in self.images)
        return Validation(self.photos.digest, images, self.stage.lmbda, self.stage.metric)

    def estimate(self, codec: HPCM) -> Quality:
        """The mean quality at the stage's λ from the codec's likelihoods, without bitstreams."""
        with codec.at_lmbda(self.stage.lmbda):
            return estimate(codec, self._interruptible(), self.stage.lmbda, self.stage.metric)

    def evaluate(self, codec: HPCM, keep: int = 0, lmbda: float | None = None) -> tuple[Evaluation, list[Tensor]]:
        """The results with real bitstreams at a λ, by default the stage's.

        The first `keep` reconstructions, (1, 3, H, W) each, come with them.
        Raises StageError for a codec that diverged.
        """
        lmbda = self.stage.lmbda if lmbda is None else lmbda
        try:
            with codec.at_lmbda(lmbda):
                return evaluate(codec, self._interruptible(), lmbda, self.stage.metric, keep)
        except ValueError as error:
            raise StageError(
                f"{self.stage.name}: not accepted: the codec cannot code the validation images: {error}.\n"
                "  The trained state is kept. A lower learning rate starts the stage again."
            ) from error

    def at_each_rate(self, codec: HPCM, own: Quality) -> Iterator[RateResult]:
        """The results of a codec of several rates at each λ, `own` at the stage's; none for another codec."""
        for lmbda in codec.config.rates:
            quality = own if lmbda == self.stage.lmbda else self.evaluate(codec, lmbda=lmbda)[0].quality
            self.watcher.note(
                f"λ = {shortest(lmbda)}: {quality.bpp:.4f} coded bpp, {quality.psnr_db:.2f} dB, "
                f"R-D loss {quality.rd_loss:.4f}"
            )
            yield RateResult(lmbda, quality)

    def _interruptible(self) -> Iterator[NamedImage]:
        for done, image in enumerate(self.images):
            self.processes.stop_if_asked()
            fault("evaluation")
            self.watcher.image(done, len(self.images))
            yield image
        self.processes.stop_if_asked()
