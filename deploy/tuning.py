"""The search for fast launches of a model's linear layers, when it is loaded on a GPU where some are not known."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exeunt.calibration.weights_int4 import Int4Plan
from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint_names import linear_shapes
from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import WeightFormat
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.tuned.files import cached_file, write_launches
from exeunt.kernels.tuned.launches import (
    DTYPES,
    MEASURED_ROWS,
    add_launches,
    is_wanted,
    known_launches,
    settled_calls,
)
from exeunt.kernels.tuned.shape import LinearShape

if TYPE_CHECKING:  # it imports Triton, which is there only where a GPU is
    from exeunt.kernels.tuned.search import Search

logger = logging.getLogger("exeunt.tuning")


def tune_launches(model: LoadedModel, seconds: float) -> None:
    """Search for so many seconds at most for launches of those calls of the model's linears that nothing is known of.

    What is found is used from then on, and kept in the user's cache for the next start, which goes on with the calls
    that the time did not reach. Known is what the package's file of that kind of GPU has, where there is one and it is
    of these kernels under this compiler, and what the cache has. Nothing is searched for where Triton does not run or
    has nothing to choose.
    """
    if seconds <= 0 or not is_wanted() or model.dtype not in DTYPES:
        return
    if model.device.type != "cuda" or not triton_runs(model.device):
        return
    index = model.device.index if model.device.index is not None else torch.cuda.current_device()
    gpu = torch.cuda.get_device_name(index)
    shapes, settled = shapes_of(model), settled_calls(index)
    if any(shape.key(rows) not in settled for shape in shapes for rows in MEASURED_ROWS):
        _search(gpu, index, shapes, seconds)


def shapes_of(model: LoadedModel) -> list[LinearShape]:
    """The linears of a loaded model, in each of its weight formats."""
    formats = dict.fromkeys(weights for weights, _ in model.decoders)
    group_size = None if model.manifest is None else model.manifest.int4_group_size
    return linears_of(model.spec, formats, model.dtype, group_size)


def linears_of(
    spec: Architecture, formats: Iterable[WeightFormat], dtype: torch.dtype, group_size: int | None
) -> list[LinearShape]:
    """The linears of a model's blocks, those of keys and values by themselves, and the output matrix.

    INT4 weights are in groups of `group_size`, None: of a calibration's own size.
    """
    groups = group_size or Int4Plan().group_size
    layers = {
        **linear_shapes(spec),
        "kv": (2 * spec.kv_size, spec.hidden_size),
        "output": (spec.vocab_size, spec.hidden_size),
    }
    return [
        LinearShape(inputs, outputs, weights == "int4", name == "gate_up", groups, dtype)
        for weights in formats
        for name, (outputs, inputs) in layers.items()
    ]


def _search(gpu: str, index: int, shapes: list[LinearShape], seconds: float) -> None:
    from exeunt.kernels.tuned.trials import search_on

    found = search_on(
        torch.device("cuda", index), shapes, seconds, settled_calls(index), known_launches(index)
    )
    add_launches(index, found.launches)
    logger.info("%s %s", _told(gpu, found), _kept(cached_file(gpu), gpu, found))


def _told(gpu: str, found: "Search") -> str:
    best = max((finding.speed_up for finding in found.faster), default=1.0)
    gain = f" (up to {best:.2f} times)" if found.faster else ""
    return (
        f"Of {found.calls} calls of these linear layers the fastest launches were not known on {gpu}: "
        f"{len(found.findings)} were tried in {found.seconds:.1f} s, {len(found.faster)} are faster now{gain}."
    )


def _kept(path: Path, gpu: str, found: "Search") -> str:
    """Where the findings are now: a cache that cannot be written costs the next start its time, and nothing else."""
    if not found.findings:
        return "Nothing is kept."
    try:
        write_launches(path, gpu, found.findings, add=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return f"They could not be kept in {path}: {reason}; each start searches anew (--tuning-seconds 0: none)."
    return f"They are kept in {path}."
