"""The options of `hpcm compress` that ask for a size or a quality of each file."""

from dataclasses import dataclass, fields
from typing import Annotated

import typer

from modules.target_codec import Target


@dataclass(frozen=True)
class TargetOptions:
    """What each file shall have; at most one is given."""

    num_bytes: Annotated[int | None, typer.Option("--bytes", min=1)] = None
    """At most so many bytes for each file, header and ICC profile included."""
    bpp: Annotated[float | None, typer.Option(min=1e-6, max=1e6)] = None
    """At most so many bits per pixel for each file."""
    psnr: Annotated[float | None, typer.Option(min=0, max=99)] = None
    """At least this PSNR in dB for each image."""

    @property
    def target(self) -> Target | None:
        """What is asked for. Raises BadParameter if more than one is given."""
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise typer.BadParameter("--bytes, --bpp and --psnr each say where to stop: give one of them")
        if self.num_bytes is not None:
            return Target("bytes", self.num_bytes)
        if self.bpp is not None:
            return Target("bits per pixel", self.bpp)
        return None if self.psnr is None else Target("dB", self.psnr)
