"""The search for fast launches of linear layers at the shapes of known models, and what they gain over the rule."""

import re
from pathlib import Path
from typing import Final

import torch

from exeunt.compression.architecture import load_architecture
from exeunt.compression.bundle import manifest_fields
from exeunt.compression.variant import WeightFormat
from exeunt.deploy.packaged_model import path as packaged_checkpoint
from exeunt.deploy.tuning import linears_of
from exeunt.kernels.tuned.files import entry_of, slug, write_launches
from exeunt.kernels.tuned.shape import LinearShape
from scripts.gpu_check.kernel_speeds import LAYERS
from scripts.gpu_check.models import GROUP_SIZE
from scripts.gpu_check.report import Context, Found

FORMATS: Final[tuple[WeightFormat, ...]] = ("int4", "full")
_SHAPE: Final = re.compile(r"(\d+)x(\d+)(:gated)?")
_MOST_LINES: Final = 40


def run(context: Context, found: Found) -> None:
    """Search within the section's time; the launches lie beside the report, as the package would hold them."""
    if not context.cuda:
        found["skipped"] = ["there is nothing to tune without a GPU"]
        return
    gpu = torch.cuda.get_device_name(context.device)
    path = context.report.path.with_name(f"tuned-{slug(gpu)}.json")
    found |= tuned(context.device, layer_shapes(), context.clock.left(), path)


def tuned(
    device: torch.device, shapes: list[LinearShape], seconds: float, path: Path, *, add: bool = False
) -> Found:
    """Search, write the launches to `path`, and say what was found: with what did not run, or not to the same bits.

    `add` keeps what a good file there says of other calls.
    """
    from exeunt.kernels.tuned.trials import search_on  # Triton is there only where a GPU is

    search = search_on(device, shapes, seconds)
    if search.findings:
        write_launches(path, torch.cuda.get_device_name(device), search.findings, add=add)
    return {
        "calls": search.calls,
        "tried": len(search.findings),
        "faster": len(search.faster),
        "search_seconds": round(search.seconds, 1),
        "file": path.name,
        "launches": [
            entry_of(finding) | {"speed_up": round(finding.speed_up, 3)} for finding in search.findings
        ],
        "failed": search.failed[:_MOST_LINES],
        "unequal": search.unequal[:_MOST_LINES],
    }


def default_shapes() -> list[LinearShape]:
    """The layers of the kernels' own section and those of the packaged model."""
    return [*layer_shapes(), *model_shapes(packaged_checkpoint(), GROUP_SIZE)]


def layer_shapes() -> list[LinearShape]:
    """The layers that the kernels' own section times, those of gate and up as a block runs them."""
    return [
        LinearShape(inputs, outputs, weights == "int4", name.endswith("gate_up"), GROUP_SIZE)
        for weights in FORMATS
        for name, (outputs, inputs) in LAYERS.items()
    ]


def model_shapes(folder: Path, group_size: int | None = None) -> list[LinearShape]:
    """The layers of the bundle or checkpoint in a folder, in both formats. Raises what `load_architecture` raises.

    A bundle says its groups' size itself; `group_size` is that of a checkpoint, None: a calibration's own.
    """
    own = (manifest_fields(folder) or {}).get("int4_group_size")
    if isinstance(own, int) and own > 0:
        group_size = own
    return linears_of(load_architecture(folder), FORMATS, torch.bfloat16, group_size)


def parsed_shape(text: str, group_size: int) -> list[LinearShape]:
    """The layer that OUTPUTSxINPUTS names, in both formats. Raises ValueError."""
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no shape such as 4096x4096 or 28672x4096:gated")
    outputs, inputs, gated = int(found[1]), int(found[2]), found[3] is not None
    return [LinearShape(inputs, outputs, weights == "int4", gated, group_size) for weights in FORMATS]
