"""What exits give in batches, by how what they skip is made up for, how rows wait, and how long contexts are.

The Mistral-7B shape with random weights and a synthetic exit half-way: speeds only. What does not wait in contexts of
256 tokens is in `end_to_end`. Every load and scheduling has an engine of its own, which is timed with exits off,
propagated and backfilled, one after the other.
"""

from typing import Final

from exeunt.compression.model import LoadedModel
from exeunt.server.stage_choice import SchedulingPolicy
from scripts.gpu_check.end_to_end import random_model
from scripts.gpu_check.engine_speeds import (
    BACKFILLED,
    HALF,
    INT4,
    NO_ROOM,
    OFF,
    engine_driver,
    engine_speeds,
)
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import INT4_ALONE, give_back, within_memory
from scripts.gpu_check.sizes import Sizes

LOADS: Final[tuple[tuple[Sizes, SchedulingPolicy], ...]] = (
    (Sizes((16, 64), 256, 64), "queues"),
    (Sizes((16,), 4096, 64), "run-through"),
)
_TOY_LOADS: Final[tuple[tuple[Sizes, SchedulingPolicy], ...]] = (
    (Sizes((2,), 16, 6), "queues"),
    (Sizes((2,), 32, 6), "run-through"),
)
_LEAST: Final = 8.0  # seconds left without which a load is not begun


def run(context: Context, found: Found) -> None:
    """Every load with exits off, propagated and backfilled."""
    model = random_model(context, found, TOY if context.quick else MISTRAL, formats=INT4_ALONE)
    if model is None:
        return
    for sizes, scheduling in _TOY_LOADS if context.quick else LOADS:
        with within_memory(context, f"contexts of {sizes.prompt}, {scheduling}", found, NO_ROOM):
            _load(context, found, model, sizes, scheduling)
    del model
    give_back(context)


def _load(
    context: Context, found: Found, model: LoadedModel, sizes: Sizes, scheduling: SchedulingPolicy
) -> None:
    name = f"contexts of {sizes.prompt}, {scheduling}"
    if not context.fits(0.0 if context.quick else _LEAST, name, found):
        return
    driver = engine_driver(model, sizes.load(sizes.most), scheduling)
    try:
        modes = {"off": (INT4, OFF), "propagate": (INT4, HALF), "backfill": (INT4, BACKFILLED)}
        prompts = driver.prompts(sizes.most, sizes.prompt)
        engine_speeds(context, found.setdefault(name, {}), model, driver, prompts, modes, sizes)
    finally:
        driver.close()
