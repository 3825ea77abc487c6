"""`python -m scripts.tune_kernels`: finds this GPU's fastest launches of linear layers and writes the package's file.

Without --model and --shape that is for the layers of `scripts.gpu_check.kernel_speeds` and of the packaged model, with
full and with INT4 weights. Lines that the file has of other calls stay.
"""

from pathlib import Path
from typing import Annotated

import typer

from scripts.gpu_check.source_tree import make_importable

make_importable()

import torch  # noqa: E402 - what stands above says where `exeunt` is

from exeunt.kernels.tuned.files import LaunchFileError, packaged_file, read_launches  # noqa: E402
from scripts.gpu_check.models import GROUP_SIZE  # noqa: E402
from scripts.gpu_check.tuning import default_shapes, model_shapes, parsed_shape, tuned  # noqa: E402

Seconds = Annotated[float, typer.Option(min=1, help="How long to search.")]
Models = Annotated[
    list[Path] | None, typer.Option("--model", help="A bundle's or checkpoint's folder; may be repeated.")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", help="OUTPUTSxINPUTS of a weight, :gated behind it where it is; may be repeated."
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(min=1, help="Of INT4 weights given by --shape or by a checkpoint; a bundle says its own."),
]
Out = Annotated[Path | None, typer.Option(help="The file; None: the package's for this kind of GPU.")]


def main(
    seconds: Seconds = 180.0,
    model: Models = None,
    shape: Shapes = None,
    group_size: GroupSize = GROUP_SIZE,
    out: Out = None,
) -> None:
    """Search, as far as the time reaches, and add what is found to the file."""
    if not torch.cuda.is_available():
        typer.echo("There is no CUDA device that PyTorch can use.", err=True)
        raise typer.Exit(2)
    try:
        shapes = [each for text in shape or () for each in parsed_shape(text, group_size)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shapes += [each for folder in model or () for each in model_shapes(folder, group_size)]
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path = out or packaged_file(gpu)
    try:
        read_launches(path, gpu)
    except FileNotFoundError:
        pass
    except (OSError, LaunchFileError) as error:  # another GPU's is not to be lost by a slip
        typer.echo(f"Nothing can be added to {path}: {error}.", err=True)
        raise typer.Exit(2) from error
    found = tuned(device, shapes or default_shapes(), seconds, path, add=True)
    for finding in found["launches"]:
        typer.echo(" ".join(f"{name}={value}" for name, value in finding.items()))
    kept = f"added to {path}" if found["launches"] else "nothing is written"
    typer.echo(
        f"{found['tried']} of {found['calls']} calls in {found['search_seconds']:.0f} s, {found['faster']} faster; "
        f"{len(found['failed'])} launches did not run, {len(found['unequal'])} gave other bits; {kept}"
    )
    for line in (*found["failed"][:10], *found["unequal"][:10]):
        typer.echo(f"  {line}")


if __name__ == "__main__":
    typer.run(main)
