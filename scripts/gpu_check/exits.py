"""What exits give in batches, by how what they skip is made up for, how rows wait, and how long contexts are.

The Mistral-7B shape with random weights and a synthetic exit half-way: speeds only. Every load and scheduling has an
engine of its own, which is timed with exits off, propagated and backfilled, one after the other.
"""

from typing import Final

from exeunt.compression.model import LoadedModel
from exeunt.deploy.bench_engine import engine_driver
from exeunt.server.stage_choice import SchedulingPolicy
from scripts.gpu_check.end_to_end import random_model
from scripts.gpu_check.engine_speeds import (
    BACKFILLED,
    HALF,
    INT4,
    OFF,
    Sizes,
    engine_speeds,
    free_memory,
)
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.report import Context, Found

LOADS: Final = (Sizes((16,), 256, 64), Sizes((64, 1), 256, 64), Sizes((16,), 4096, 64))
_TOY_LOADS: Final = (Sizes((2,), 16, 6), Sizes((2,), 32, 6))
_LEAST: Final = 15.0  # seconds left without which a load is not begun
_QUEUES: Final = 1  # of the loads so many are run with rows that wait at exits, too


def run(context: Context, found: Found) -> None:
    """Every load with exits off, propagated and backfilled."""
    model = random_model(context, found, TOY if context.quick else MISTRAL)
    loads = _TOY_LOADS if context.quick else LOADS
    for number, sizes in enumerate(loads):
        _load(context, found, model, sizes, "run-through")
        if number < _QUEUES:
            _load(context, found, model, sizes, "queues")
    del model
    free_memory(context)


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
