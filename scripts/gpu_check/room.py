"""Whether a device has room for what is about to be built: what is too large for it is named, and the rest goes on."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from exeunt.compression.architecture import Architecture
from exeunt.compression.memory import free_bytes
from exeunt.compression.variant import WeightFormat
from scripts.gpu_check.models import GROUP_SIZE
from scripts.gpu_check.report import Context, Found

FORMATS: Final[tuple[WeightFormat, ...]] = ("full", "int4")
INT4_ALONE: Final[tuple[WeightFormat, ...]] = ("int4",)
LACKING: Final = (torch.OutOfMemoryError,)
_SPARE: Final = 1.05  # of what is counted: allocations are rounded up
_BESIDE: Final = 2e9  # bytes beside the weights of a model that is to run


def room(context: Context) -> int:
    """Bytes that can be had now, with those that PyTorch keeps for later and does not use."""
    give_back(context)
    return free_bytes(context.device)


def give_back(context: Context) -> None:
    """Have PyTorch give back the GPU's memory that nothing uses any more; a CPU's waits for nobody."""
    if context.cuda:
        gc.collect()
        torch.cuda.empty_cache()


def has_room(context: Context, nbytes: float, what: str, found: Found) -> bool:
    """Whether so many bytes can be had on a GPU; where not, `found` says what was left out."""
    if not context.cuda:
        return True
    if nbytes * _SPARE <= free_bytes(context.device):
        return True  # without what PyTorch keeps: to give that back takes its time
    free = room(context)
    if nbytes * _SPARE <= free:
        return True
    found.setdefault("skipped", []).append(
        f"{what} needs {nbytes * _SPARE / 1e9:.1f} GB, {free / 1e9:.1f} are free"
    )
    return False


@contextmanager
def within_memory(
    context: Context, what: str, found: Found, errors: tuple[type[Exception], ...] = LACKING
) -> Iterator[None]:
    """What runs inside may find too little memory all the same: then `found` says so, and nothing is raised."""
    try:
        yield
    except errors as error:
        line = next(iter(str(error).strip().splitlines()), "")
        found.setdefault("skipped", []).append(f"{what}: {line}"[:300])
        del error  # its frames hold what was built
        give_back(context)


def weight_bytes(spec: Architecture, weights: WeightFormat) -> int:
    """Bytes of a model's weights in bfloat16, or with all linears in INT4 codes, scales and offsets."""
    full = 2 * spec.parameters
    if weights == "full":
        return full
    linears = spec.blocks * spec.block_parameters + spec.vocab_size * spec.hidden_size
    return int(full - linears * (2 - 0.5 - 4 / GROUP_SIZE))


def held_formats(
    context: Context,
    spec: Architecture,
    what: str,
    found: Found,
    wanted: tuple[WeightFormat, ...] = FORMATS,
) -> tuple[WeightFormat, ...]:
    """Those of the `wanted` formats of a random model's weights that the device has room for side by side.

    All, else INT4 alone, else none; what there is no room for is named in `found`.
    """
    for formats in dict.fromkeys((wanted, INT4_ALONE)):
        needed = sum(weight_bytes(spec, each) for each in formats) + _BESIDE
        if has_room(context, needed, f"{what} in {' and '.join(formats)}", found):
            return formats
    return ()
