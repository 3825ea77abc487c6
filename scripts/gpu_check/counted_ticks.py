"""How often an engine took a newer way: ticks whose exits the device decided, and steps begun before their turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from exeunt.server.device_passes import DevicePasses
from exeunt.server.runner import Runner


@dataclass(slots=True)
class Ticks:
    """Ticks so far."""

    on_device: int = 0
    begun_ahead: int = 0


@contextmanager
def counted_ticks() -> Iterator[Ticks]:
    """The ticks of every engine of this process until the end of the context."""
    found, run, begin = Ticks(), DevicePasses.run, Runner._begin

    def counted_run(passes: DevicePasses, *given: Any) -> bool:
        done = run(passes, *given)
        found.on_device += done
        return done

    def counted_begin(runner: Runner, *given: Any) -> bool:
        done = begin(runner, *given)
        found.begun_ahead += done
        return done

    with patch.object(DevicePasses, "run", counted_run), patch.object(Runner, "_begin", counted_begin):
        yield found
