"""Where the engine's thread spends a tick of the packaged model, by function: what the GPU waits for."""

from functools import partial
from typing import Final

from scripts.gpu_check.end_to_end import packaged_model
from scripts.gpu_check.engine_speeds import BACKFILLED, HALF, INT4, OFF, VERIFIED, engine_driver, warmed
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.sizes import Sizes
from scripts.tick_time import watching

_MODES: Final = {"off": OFF, "verified": VERIFIED, "propagate": HALF, "backfill": BACKFILLED}
_LEAST = 3.0  # seconds left without which a mode is not begun
_FUNCTIONS = 25  # kept of each


def run(context: Context, found: Found) -> None:
    """INT4 weights and KV, exits off and, where the bundle has exits, in every mode at a threshold of 0.5."""
    sizes = Sizes((2,), 16, 6) if context.quick else Sizes((16, 1, 64), 64, 64)
    model = packaged_model(context)
    driver = engine_driver(model, sizes.load(sizes.most))
    try:
        prompts = driver.prompts(sizes.most, sizes.prompt)
        for streams in sizes.streams:
            for mode, exits in _MODES.items():
                name = f"{mode}, {streams} streams"
                if (exits is not OFF and not model.exits) or not context.fits(_LEAST, name, found):
                    continue
                load = partial(driver.run, prompts[:streams], INT4, exits, sizes.load(streams))
                warmed(context, model, load)
                with watching() as watched:
                    load()
                found[name] = _figures(watched.medians())
                context.report.save()
    finally:
        driver.close()


def _figures(medians: dict[str, float]) -> Found:
    """Microseconds of a tick, and of the functions that take longest."""
    whole = medians.pop("", 0.0)
    longest = list(medians.items())[:_FUNCTIONS]
    return {"us": whole * 1e6, "functions": {name: seconds * 1e6 for name, seconds in longest}}
