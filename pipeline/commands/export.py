"""`hpcm export`: a checkpoint in other forms."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.checkpoint_info import CODEC_FORMS, codec_path
from pipeline.commands.display import console
from pipeline.weights.export import export_compressai, export_half
from pipeline.weights.torch_programs import export_onnx, export_programs


def export(
    source: Annotated[Path, typer.Argument(parser=codec_path, metavar="CODEC", help=CODEC_FORMS)],
    target: Annotated[
        Path,
        typer.Argument(
            help="The file to write: .safetensors in half precision, .pth.tar for CompressAI's tools; "
            "or the folder for --torch and --onnx."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_programs: Annotated[
        bool, typer.Option("--torch", help="Write the networks as torch.export programs, with a runtime.")
    ] = False,
    as_onnx: Annotated[bool, typer.Option("--onnx", help="Write the networks as ONNX; needs onnx and onnxscript.")] = (
        False
    ),
    keep_op: Annotated[
        bool, typer.Option("--keep-op", help="Keep the operator hpcm::biwkv4; `import modules.biwkv4.op` registers it.")
    ] = False,
) -> None:
    """Write a checkpoint for distribution, for CompressAI's tools, or as programs that run without this package.

    A .safetensors file has half the size and loads like any other checkpoint. --torch and --onnx write one file for
    each network: g_a, h_a, h_s, g_s, the context model's step at each scale, and the fusions. These files do not
    contain the entropy coding.
    """
    if (as_programs and as_onnx) or (keep_op and not as_programs):
        raise typer.BadParameter("give --torch or --onnx, not both; --keep-op belongs to --torch")
    if as_programs:
        export_programs(source, target, keep_op)
        console.print(f"{target}: {', '.join(sorted(path.stem for path in target.glob('*.pt2')))}; see runtime.py")
    elif as_onnx:
        outcomes = export_onnx(source, target)
        for name, problem in sorted(outcomes.items()):
            console.print(f"{name}: {problem or f'{name}.onnx'}")
        if any(outcomes.values()):
            raise typer.Exit(1)
    else:
        (export_compressai if target.name.endswith(".pth.tar") else export_half)(source, target, overwrite)
        console.print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, from {source.stat().st_size / 1e6:.1f} MB")
