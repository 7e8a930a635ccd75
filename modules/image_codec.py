"""Codes images to files and back with a model. `modules.bitstream.file_format` describes the file."""

from torch import Tensor

from modules.bitstream.coding import Decoded
from modules.bitstream.file_format import EPSILON, BitstreamError, CodedImage, check_dimensions
from modules.bitstream.identity import model_identity
from modules.codec import HPCM
from modules.refinement import GoOn


class ImageCodec:
    """Codes images to files and back with a model. Builds the model's coding tables.

    `effort` and `go_on` are those of `HPCM.compress`. Raises ValueError if the model's λ is needed and not known.
    """

    def __init__(self, model: HPCM, effort: int = 0, go_on: GoOn = lambda *_: True):
        model.check_effort(effort)
        self.effort, self.go_on = effort, go_on
        model.update()
        self.model = model.eval()
        self.identity = model_identity(model)

    def encode(self, image: Tensor, icc_profile: bytes = b"", epsilon: float = EPSILON) -> CodedImage:
        """Code one image (1, 3, H, W) in [0, 1] for decoders within ε. Raises BitstreamError if it is too large."""
        self.check(image)
        (y,), (z,) = self.model.compress(image, epsilon, self.effort, self.go_on)["strings"]
        return CodedImage(self.identity, image.shape[2], image.shape[3], z, y, icc_profile)

    def check(self, image: Tensor) -> None:
        """Raise what `encode` raises for an image that it cannot code."""
        self.model.check_images(image, wait=True)
        if len(image) > 1:
            raise ValueError(f"a file holds one image, not {len(image)}: encode them one by one")
        check_dimensions(*image.shape[2:])

    def decode(self, coded: CodedImage) -> Decoded:
        """The image, and how it was recovered. Raises BitstreamError for another model's file and if recovery fails."""
        self.check_identity(coded)
        decoded = self.model.decompress([[coded.y], [coded.z]], (coded.height, coded.width))
        return Decoded(decoded["x_hat"], decoded["recovery"][0])

    def check_identity(self, coded: CodedImage) -> None:
        """Raise BitstreamError unless this model made the file."""
        if coded.identity != self.identity:
            raise BitstreamError(
                f"made by another model: {coded.identity.hex()}; this checkpoint is {self.identity.hex()}"
            )
