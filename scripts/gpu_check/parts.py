"""A section of several parts: each has its seconds for certain, and one that breaks does not end the others."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.gpu_check.engine_speeds import NO_ROOM
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import within_memory


@dataclass(frozen=True, slots=True)
class Part:
    """A part by its name; what `run` finds goes into the section's results under `key`."""

    name: str
    key: str
    seconds: float
    least: float  # seconds under which it is not begun
    run: Callable[[Context, Found], None]


def run_parts(context: Context, found: Found, parts: Sequence[Part]) -> None:
    """Run all parts for which there is time, the others named in `found`. Raises what the first that broke raised."""
    first: Exception | None = None
    for number, part in enumerate(parts):
        if not context.fits(part.least, part.name, found):
            continue
        kept = sum(each.seconds for each in parts[number + 1 :])
        own = found.setdefault(part.key, {})
        try:
            with within_memory(context, part.name, own, NO_ROOM):
                part.run(context.within(context.share(part.seconds, kept)), own)
        except Exception as error:  # noqa: BLE001 - the parts behind it are worth having all the same
            traceback.print_exc()
            found.setdefault("broken", {})[part.name] = f"{type(error).__name__}: {error}"[:300]
            first = first or error
        context.report.save()
    if first is not None:
        raise first
