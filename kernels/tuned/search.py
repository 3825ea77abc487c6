"""A bounded search for the fastest launches of linear layers: what a decode step needs first, large weights first.

It knows no GPU: a `Trial` runs and times a call. Only launches with the rule's bits are taken, and only those that are
clearly faster, in a second measurement too. What does not compile or does not fit the GPU is passed over.

Equal results do not show equal sums: rounded to 16 bits, few of those that were summed in another order differ. So what
is to be taken is compared in its sums' low bits too.
"""

import logging
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

from exeunt.kernels.tuned.candidates import candidates
from exeunt.kernels.tuned.files import Finding
from exeunt.kernels.tuned.launches import Key, TunedLaunch
from exeunt.kernels.tuned.shape import LinearShape

ORDER: Final = (1, 16, 64, 512, 8, 32, 128)
"""Rows of the calls, those first whose answers are worth most: what the time does not allow is left to the rule."""
LEAST_GAIN: Final = 1.03
"""How many times as fast as by the rule a launch must be: less is the noise of a measurement."""

_log = logging.getLogger(__name__)
_BITS: Final = {2: torch.int16, 4: torch.int32}


class Trial(Protocol):
    """One call of a linear layer, to be run in many ways; a launch that is None is the rule's."""

    def prepare(self, launches: Sequence[TunedLaunch], left: Callable[[], float]) -> None:
        """Compile what `launches` need, for as long as `left` seconds are more than none. Raises nothing of theirs."""
        ...

    def result(self, launch: TunedLaunch | None) -> Tensor:
        """What the call gives [rows, outputs], always of the same inputs. Raises whatever keeps it from running."""
        ...

    def low_bits(self, launch: TunedLaunch | None) -> Tensor:
        """What is left of the first row's sums [outputs] when the rule's are taken from them before they are rounded.

        Raises as `result`.
        """
        ...

    def seconds(self, launch: TunedLaunch | None) -> float:
        """How long the call takes. Raises as `result`."""
        ...


@dataclass(slots=True)
class Search:
    """What a search has found: by call, and the launches that did not run or did not give the rule's bits."""

    findings: list[Finding] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    seconds: float = 0.0
    calls: int = 0  # how many calls there were to try

    @property
    def launches(self) -> dict[Key, TunedLaunch | None]:
        """The findings as they are looked up."""
        return {finding.key: finding.launch for finding in self.findings}

    @property
    def faster(self) -> list[Finding]:
        """The findings that beat the rule."""
        return [finding for finding in self.findings if finding.launch is not None]


def search(
    shapes: Iterable[LinearShape],
    seconds: float,
    trial: Callable[[LinearShape, int], Trial],
    *,
    most_warps: int,
    known: Container[Key] = (),
    used: Mapping[Key, TunedLaunch | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """The fastest launches of calls of `shapes` that can be found in so many seconds, those `known` left out.

    The time may be exceeded by what one launch takes to compile or to be timed. `trial` makes what runs a shape with a
    number of rows; a call whose trial cannot be made, or does not run by the rule either, is passed over. What a call
    is `used` with until now is tried first: what is found takes its place, though the time may end before all are
    tried. For `most_warps` see `candidates`.
    """
    began = clock()
    ordered = sorted(dict.fromkeys(shapes), key=lambda shape: -shape.weight_bytes)
    calls = {
        shape.key(rows): (shape, rows) for rows in ORDER for shape in ordered if shape.key(rows) not in known
    }
    found = Search(calls=len(calls))

    def left() -> float:
        return seconds - (clock() - began)

    for shape, rows in calls.values():
        if left() <= 0:
            break
        try:
            launches = _with_first(candidates(shape, rows, most_warps), (used or {}).get(shape.key(rows)))
            finding = _tried(shape, rows, trial(shape, rows), launches, found, left)
        except Exception as error:  # noqa: BLE001 - a call that does not fit the GPU leaves the others worth trying
            found.failed.append(_said(shape, rows, None, error))
            continue
        if finding is not None:
            found.findings.append(finding)
    found.seconds = clock() - began
    return found


def _with_first(launches: Sequence[TunedLaunch], first: TunedLaunch | None) -> list[TunedLaunch]:
    """The launches, `first` before all others if there is one."""
    return [*launches] if first is None else [first, *(launch for launch in launches if launch != first)]


def _tried(
    shape: LinearShape,
    rows: int,
    trial: Trial,
    launches: Sequence[TunedLaunch],
    found: Search,
    left: Callable[[], float],
) -> Finding | None:
    """What is found of one call; None where the time ended before anything was."""
    wanted = trial.result(None)
    by_rule = trial.seconds(None)
    trial.prepare(launches, left)
    times: dict[TunedLaunch, float] = {}
    for launch in launches:
        if left() <= 0:
            break
        try:
            if not _same_bits(trial.result(launch), wanted):
                found.unequal.append(_said(shape, rows, launch))
                continue
            times[launch] = trial.seconds(launch)
        except Exception as error:  # noqa: BLE001 - out of shared memory, a compiler's error: another launch will do
            found.failed.append(_said(shape, rows, launch, error))
    else:
        return _best(shape, rows, trial, by_rule, times, found) or Finding(
            shape.key(rows), None, by_rule, by_rule
        )
    return _best(shape, rows, trial, by_rule, times, found)


def _best(
    shape: LinearShape,
    rows: int,
    trial: Trial,
    by_rule: float,
    times: dict[TunedLaunch, float],
    found: Search,
) -> Finding | None:
    """The fastest of the launches that sums as the rule does, where it beats the rule twice over."""
    for launch in sorted(times, key=times.__getitem__):
        if by_rule <= times[launch] * LEAST_GAIN:
            return None
        if _sums_alike(shape, rows, trial, launch, found):
            seconds, again = trial.seconds(launch), trial.seconds(None)
            return Finding(shape.key(rows), launch, seconds, again) if again > seconds * LEAST_GAIN else None
    return None


def _sums_alike(shape: LinearShape, rows: int, trial: Trial, launch: TunedLaunch, found: Search) -> bool:
    """Whether a launch has the rule's sums before they are rounded; asked of those to be taken, since it compiles."""
    try:
        if _same_bits(trial.low_bits(launch), trial.low_bits(None)):
            return True
        found.unequal.append(_said(shape, rows, launch))
    except Exception as error:  # noqa: BLE001 - as where it is run without: another launch will do
        found.failed.append(_said(shape, rows, launch, error))
    return False


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = _BITS[one.element_size()]
    return one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))


def _said(shape: LinearShape, rows: int, launch: TunedLaunch | None, error: Exception | None = None) -> str:
    """A line about a launch that is not taken."""
    kind = f"{'int4' if shape.int4 else 'full'}{' gated' if shape.gated else ''}"
    how = "the rule" if launch is None else f"{launch.tile}{', parts apart' if launch.split else ''}"
    line = f"{kind} {shape.out_features} x {shape.in_features}, {rows} rows, {how}"
    if error is not None:
        line += f": {type(error).__name__}: {error}".splitlines()[0][:200]
    _log.debug("Not taken: %s", line)
    return line
