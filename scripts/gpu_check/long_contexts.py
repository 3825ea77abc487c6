"""The engine and transformers in long contexts: the Mistral-7B shape with random weights, a few streams, short answers.

Speeds only; the exit is synthetic. One load of each is timed, and reading the prompts takes the most of it: the tokens
per second from the first one on stand apart.
"""

from collections.abc import Sequence
from typing import Final

from exeunt.compression.model import LoadedModel
from scripts.gpu_check.end_to_end import SYNTHETIC, offered, random_model
from scripts.gpu_check.engine_speeds import (
    FULL,
    HALF,
    INT4,
    NO_ROOM,
    OFF,
    Modes,
    engine_driver,
    engine_speeds,
)
from scripts.gpu_check.models import MISTRAL, TOY, Shape
from scripts.gpu_check.prompts import packaged_prompts
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import give_back, has_room, weight_bytes, within_memory
from scripts.gpu_check.sizes import Sizes
from scripts.gpu_check.transformers_speeds import generate_speeds, transformers_model

SIZES: Final = (Sizes((4,), 4096, 32), Sizes((2,), 16384, 32))
_TOY_SIZES: Final = (Sizes((2,), 40, 4), Sizes((1,), 90, 4))
MODES: Final[Modes] = {
    "int4/int4": (INT4, OFF),
    "full/full": (FULL, OFF),
    f"int4/int4 exits at 0.5 {SYNTHETIC}": (INT4, HALF),
}
_ENGINES: Final = 0.6  # share of the time that the engine has
_LEAST: Final = 4.0  # seconds left without which a context is not begun
_BESIDE: Final = 6e9
"""Bytes of transformers' keys and values, twice while they grow, and of long prompts' states."""


def run(context: Context, found: Found) -> None:
    """The engine in every context, then transformers."""
    shape, sizes = (TOY, _TOY_SIZES) if context.quick else (MISTRAL, SIZES)
    ours = context.within(context.clock.left() * _ENGINES)
    model = random_model(ours, found, shape)
    if model is not None:
        for number, each in enumerate(sizes):
            share = ours.within(ours.clock.left() / (len(sizes) - number))
            own = cell(found, model.name, each)
            own["gates"] = found["gates"]
            prompts = packaged_prompts(each.most, each.prompt)
            engine_in_context(share, own, model, prompts, MODES, each, _LEAST)
        del model
    give_back(context)
    _transformers(context, found, shape, sizes)


def cell(found: Found, shape: str, sizes: Sizes) -> Found:
    """Where the results of a shape in contexts of one length stand."""
    own: Found = found.setdefault(f"{shape}, contexts of {sizes.prompt}", {})
    own |= {"prompt": sizes.prompt, "answer": sizes.answer}
    return own


def engine_in_context(
    context: Context,
    own: Found,
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    modes: Modes,
    sizes: Sizes,
    least: float,
) -> None:
    """The modes that the model offers, on an engine with room for this load; none is begun with less than `least`."""
    name = f"engine, {model.name}, contexts of {sizes.prompt}, {sizes.most} streams"
    if not context.fits(least, name, own):
        return
    with within_memory(context, name, own, NO_ROOM):
        driver = engine_driver(model, sizes.load(sizes.most))
        try:
            engine_speeds(context, own, model, driver, prompts, offered(model, modes, own), sizes, least)
        finally:
            driver.close()
            del driver
    give_back(context)


def _transformers(context: Context, found: Found, shape: Shape, sizes: tuple[Sizes, ...]) -> None:
    name = f"transformers on {shape.name} in long contexts"
    if not context.fits(_LEAST, name, found) or not has_room(
        context, weight_bytes(shape.spec(), "full") + _BESIDE, name, found
    ):
        return
    with within_memory(context, name, found):
        theirs = transformers_model(context, shape)
        for number, each in enumerate(sizes):
            share = context.within(context.clock.left() / (len(sizes) - number))
            own = cell(found, shape.name, each)
            generate_speeds(share, own, theirs, packaged_prompts(each.most, each.prompt), each)
        del theirs
    give_back(context)
