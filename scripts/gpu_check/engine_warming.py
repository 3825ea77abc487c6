"""Compiles the kernels of the engine's steps by running it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from exeunt.compression.model import LoadedModel
from exeunt.server.request import ExitPolicy
from scripts.gpu_check.end_to_end import packaged_model, random_model
from scripts.gpu_check.engine_speeds import BACKFILLED, HALF, INT4, OFF, engine_driver
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.report import Context
from scripts.gpu_check.room import INT4_ALONE
from scripts.gpu_check.sizes import Sizes


def exit_jobs(context: Context, *, packaged: bool) -> Iterator[Callable[[], None]]:
    """Answers with approximate exits, by as many streams as are timed: their steps are graphs of other kernels."""
    shape = TOY if context.quick else MISTRAL
    model = (
        packaged_model(context)
        if packaged
        else random_model(context, {}, shape, blocks=2, rate=None, formats=INT4_ALONE)
    )
    if model is None:
        return
    modes = (HALF, BACKFILLED) if model.exits else (OFF,)
    for streams in (2,) if context.quick else (64, 16, 1):
        yield partial(_answer, model, streams, modes)


def _answer(model: LoadedModel, streams: int, modes: Sequence[ExitPolicy]) -> None:
    sizes = Sizes((streams,), 16, 4)
    driver = engine_driver(model, sizes.load(streams))
    try:
        prompts = driver.prompts(streams, sizes.prompt)
        for exits in modes:
            driver.run(prompts, INT4, exits, sizes.load(streams))
    finally:
        driver.close()
