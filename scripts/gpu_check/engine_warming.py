"""Compiles the kernels of the engine's steps by running it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.request import ExitPolicy
from scripts.gpu_check.end_to_end import random_model
from scripts.gpu_check.engine_speeds import BACKFILLED, FULL, HALF, INT4, VERIFIED, engine_driver
from scripts.gpu_check.exit_answers import Drafting, model_with_exits
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.report import Context
from scripts.gpu_check.room import INT4_ALONE
from scripts.gpu_check.sizes import Sizes


def exit_jobs(context: Context, *, packaged: bool) -> Iterator[Callable[[], None]]:
    """Answers with exits, by as many streams as are checked or timed: their steps are graphs of other kernels."""
    shape = TOY if context.quick else MISTRAL
    variants: tuple[Variant, ...] = (INT4,)
    modes: tuple[ExitPolicy, ...] = (HALF, BACKFILLED)
    if packaged:
        model: LoadedModel | None = model_with_exits(context, {}, rate=None)
        variants, modes = (INT4, FULL), (HALF, BACKFILLED, VERIFIED)
    else:
        model = random_model(context, {}, shape, blocks=2, rate=None, formats=INT4_ALONE)
    if model is None:
        return
    for streams in (2,) if context.quick else (64, 17, 1):
        for variant in variants:
            yield partial(_answer, model, streams, variant, modes)


def _answer(model: LoadedModel, streams: int, variant: Variant, modes: Sequence[ExitPolicy]) -> None:
    sizes = Sizes((streams,), 16, 6)
    driver = engine_driver(model, sizes.load(streams), new_drafter=lambda request: Drafting())
    try:
        prompts = driver.prompts(streams, sizes.prompt)
        for exits in modes:
            driver.run(prompts, variant, exits, sizes.load(streams))
    finally:
        driver.close()
