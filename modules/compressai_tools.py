"""Runs CompressAI's command-line tools with this codec among their architectures, as `hpcm`.

`python -m modules.compressai_tools eval_model checkpoint photos/ -a hpcm -p codec.pth.tar` runs
`python -m compressai.utils.eval_model checkpoint …`. CompressAI has no plug-ins. Its tools look architectures up in two
dictionaries, and this module adds `hpcm` to both. `hpcm export checkpoint.safetensors codec.pth.tar` makes the file.
"""

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from compressai import ops, zoo
from compressai.zoo import image as image_zoo

from modules.codec import HPCM

NAME = "hpcm"


def add_architecture() -> None:
    """Add the codec to the architectures of CompressAI's tools."""
    image_zoo.model_architectures[NAME] = HPCM
    zoo.image_models[NAME] = _no_pretrained_weights


def _no_pretrained_weights(**options: object) -> HPCM:
    raise ValueError("CompressAI has no weights of hpcm to download; use `checkpoint`, not `pretrained`")


def main(arguments: Sequence[str]) -> None:
    """Run one of CompressAI's tools. `arguments` are its name, such as `eval_model`, then its own arguments."""
    if not arguments or find_spec(f"compressai.utils.{arguments[0]}") is None:
        sys.exit("usage: python -m modules.compressai_tools eval_model|update_model|plot|… [its own arguments]")
    add_architecture()
    tool, *rest = arguments
    if NAME in rest:
        # `eval_model` would pad images with black to multiples of 64, which costs bits. The codec pads them itself.
        ops.compute_padding = lambda height, width, **options: ((0, 0, 0, 0), (0, 0, 0, 0))
    sys.argv = [f"compressai.utils.{tool}", *rest]
    runpy.run_module(f"compressai.utils.{tool}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
