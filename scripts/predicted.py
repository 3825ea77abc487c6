"""The speed of verified exits that a bundle's measured costs predict, from the passes that a generation really ran.

The costs are those of `report.json`, measured when the bundle was calibrated: a token's way to the drafting exit, one,
two, three, … tokens' way from there to the end, a gate. Which passes there were follows from what was drafted and
accepted. What is missing to the prediction is spent around the passes: on scheduling, sampling, events.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exeunt.compression.model import LoadedModel
from exeunt.server.tick_run import StageRun

_PROMPT = 16  # tokens; runs of more read a prompt in


@dataclass(frozen=True, slots=True)
class Prediction:
    """Costs of one stream in units of a token without drafts, split at the drafting exit behind stage `exit_stage`."""

    exit_stage: int
    gate: float
    shallow: float
    tokens: tuple[int, ...]
    deep: tuple[float, ...]  # of so many tokens

    @classmethod
    def of(cls, model: LoadedModel, report: Path) -> "Prediction | None":
        """Of a bundle's report; None where no exit drafts or it was not chosen by measured costs."""
        place = model.drafting_exit
        found: Mapping[str, Any] = json.loads(report.read_text()).get("costs", {})
        costs = found.get("in_units_of_a_token_of_one_stream")
        if place is None or costs is None:
            return None
        depth = str(model.exits[place].block + 1)
        gate = costs["gate"] + costs["projection"]
        tokens, deep = tuple(costs["deep_tokens"]), tuple(costs["deep"][depth])
        return cls(place, gate, costs["shallow"][depth], tokens, deep)

    def ratio(self, runs: Iterable[StageRun], tokens: int) -> float:
        """The speed of a generation of so many tokens over that without drafts."""
        return tokens / sum(self._cost(run) for run in runs if run.tokens <= _PROMPT)

    def _cost(self, run: StageRun) -> float:
        deep = float(np.interp(run.tokens, self.tokens, self.deep))
        shallow = (
            self.shallow * deep / self.deep[0]
        )  # more tokens are dearer there as they are behind the exit
        first, last = run.stages[0], run.stages[-1]
        cost = shallow if first <= self.exit_stage else 0.0
        if last > self.exit_stage:
            cost += deep
        return cost + (self.gate * run.gated if run.gated else 0.0)
