"""Where the engine's thread spends a tick: seconds in each function but not in those it calls, medians over ticks.

A function that waits for a device counts its wait. Watched are plain functions and methods, under every name by which
modules know them: not properties, class methods, `__init__` and the like, nor what was bound before (a method handed
over as a callback), whose seconds are their caller's; a generator's are those of whoever goes through it. Watching
costs about half a microsecond a call, so ticks of small models take longer than they do unwatched: read the shares.
"""

import functools
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from exeunt.kernels.native.library import native_library
from exeunt.server.lifecycle import Lifecycle
from exeunt.server.tick import Tick

WATCHED = ("exeunt.server.", "exeunt.compression.", "exeunt.kernels.")
"""Modules whose functions are watched, those that are loaded."""
SETTLING = 20
"""Ticks at the beginning that are left out: prompts, first captures."""
_OUTSIDE = ("exeunt.server.api.", "exeunt.server.settings")
_RUN = "server.lifecycle: Lifecycle.run"


class HostTime:
    """The ticks of one engine's thread, each as seconds by function."""

    def __init__(self) -> None:
        self.ticks: list[dict[str, float]] = []
        self._tick: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # of the functions under way, the seconds of those they called
        self._thread: int | None = None
        self._began = 0.0

    def next_tick(self) -> None:
        """On the engine's thread: what follows belongs to another tick."""
        now = time.perf_counter()
        if self._thread == threading.get_ident() and _RUN in self._tick:  # else nothing was there to be run
            self.ticks.append({**self._tick, "": now - self._began})
        self._thread, self._began = threading.get_ident(), now
        self._tick.clear()

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds counted where the engine's thread calls it."""

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            began, depth = time.perf_counter(), len(self._inner)
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self._tick[name] += took - self._inner[depth]
                del self._inner[depth:]
                if depth:
                    self._inner[-1] += took

        return counting

    @property
    def settled(self) -> list[dict[str, float]]:
        """The ticks behind the first, which read prompts and capture graphs; all where these are few."""
        return self.ticks[SETTLING:] or self.ticks

    def medians(self) -> dict[str, float]:
        """Seconds a tick by function, most first; "" is all of the tick. Nothing where no tick ended."""
        ticks = self.settled
        names = {name for tick in ticks for name in tick}
        found = {name: statistics.median(tick.get(name, 0.0) for tick in ticks) for name in names}
        return dict(sorted(found.items(), key=lambda each: -each[1]))


@contextmanager
def watching() -> Iterator[HostTime]:
    """Watch the functions and methods of the modules `WATCHED` that are loaded, until the end of the context."""
    found, undo = HostTime(), list[tuple[Any, str, Any]]()
    modules = [module for name, module in sys.modules.items() if _is_watched(name)]
    wrapped: dict[FunctionType, Callable[..., Any]] = {}
    for module in modules:
        for owner, name, function in list(_functions(module)):
            called = f"{owner.__name__}.{name}" if isinstance(owner, type) else name
            wrapped[function] = found.watched(
                f"{module.__name__.removeprefix('exeunt.')}: {called}", function
            )
    for module in modules:  # a function stands under its name wherever it was imported
        for owner, name, function in list(_functions(module, imported=True)):
            if function in wrapped:
                undo.append((owner, name, function))
                setattr(owner, name, wrapped[function])
    next_tick = Lifecycle.next_tick

    def counted(self: Lifecycle) -> Tick | None:
        found.next_tick()
        return next_tick(self)

    Lifecycle.next_tick = counted  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Lifecycle.next_tick = next_tick  # type: ignore[method-assign]
        for owner, name, function in undo:
            setattr(owner, name, function)


@contextmanager
def unwatched() -> Iterator[list[float]]:
    """Of each tick until the end of the context the CPU seconds of the engine's thread outside native passes."""
    ticks: list[float] = []
    library, next_tick, began, inside = native_library(), Lifecycle.next_tick, 0.0, 0.0

    def passing(*arguments: Any) -> Any:
        nonlocal inside
        entered = time.thread_time()
        try:
            return model_pass(*arguments)
        finally:
            inside += time.thread_time() - entered

    def counted(self: Lifecycle) -> Tick | None:
        nonlocal began, inside
        now = time.thread_time()
        if began:
            ticks.append(now - began - inside)
        began, inside = now, 0.0
        return next_tick(self)

    Lifecycle.next_tick = counted  # type: ignore[method-assign]
    if library is not None:
        model_pass, library.model_pass = library.model_pass, passing
    try:
        yield ticks
    finally:
        Lifecycle.next_tick = next_tick  # type: ignore[method-assign]
        if library is not None:
            library.model_pass = model_pass


def _is_watched(name: str) -> bool:
    return name.startswith(WATCHED) and not name.startswith(_OUTSIDE)


def _functions(module: ModuleType, *, imported: bool = False) -> Iterator[tuple[Any, str, FunctionType]]:
    """The functions of a module and of its classes, with whom they belong to; `imported`: those of others too."""
    for name, member in vars(module).items():
        if isinstance(member, FunctionType) and (imported or member.__module__ == module.__name__):
            yield module, name, member
        elif isinstance(member, type) and member.__module__ == module.__name__:
            for own, function in vars(member).items():
                if isinstance(function, FunctionType) and not own.startswith("__"):
                    yield member, own, function
