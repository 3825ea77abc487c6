"""What a benchmark's runs would have taken were there nothing but stages, each at its usual cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from exeunt.server.runner import StageRun

Kind = tuple[int, int, int, bool]
"""First and last stage, tokens, whether a gate was asked at the end."""


def _kind(run: StageRun) -> Kind:
    return run.stages[0], run.stages[-1], run.tokens, run.gated > 0


@dataclass(frozen=True, slots=True)
class StageMedians:
    """The median time of each kind of run of stages, gates and draws included: the measured cost per row count."""

    seconds: dict[Kind, float]

    @classmethod
    def of(cls, runs: Iterable[Sequence[StageRun]]) -> "StageMedians":
        """From all that several generations ran."""
        found: dict[Kind, list[float]] = {}
        for run in runs:
            for stages in run:
                found.setdefault(_kind(stages), []).append(stages.seconds)
        return cls({kind: statistics.median(times) for kind, times in found.items()})

    def predicted(self, run: Sequence[StageRun]) -> float:
        """Seconds of a generation that ran these, at their medians, with nothing around them."""
        return sum(self.seconds[_kind(stages)] for stages in run)
