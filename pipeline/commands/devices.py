"""The device that a command computes on."""

import re

import torch
import typer


def device_of(name: str) -> torch.device:
    """The device of this name; raises BadParameter if it is unknown or missing."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"--device {name}: give cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device here")
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
