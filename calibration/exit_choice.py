"""Which exits are kept: those that are expected to save computation, net of what asking them costs.

Every exit that a token passes costs its gate, and where the gate projects in vain a projection, or where a shortlist
let it pass in vain two; every token that leaves saves the blocks behind it, less the keys and values it still owes
them. Agreement is no guide: at half depth half of the tokens may agree and almost none may leave safely, while all of
them pay the gate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np

from exeunt.calibration.thresholds import GateView, forecast_of

MOST_EXITS: Final = 2
"""More than two would pay only where the blocks between two exits cost much more than a gate."""


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """What exits cost per token, in units of one block (see `exeunt.calibration.exit_costs`)."""

    gate: float  # a whole gate that looks at nobody: norm, adapter, probe and the call
    projection: float  # a look in vain: the output matrix, or a shortlist of it, and how sure its logits are
    skipped_kv: float  # keys and values of one skipped block
    leaving: float = 0.0  # a look at a token that leaves, beyond the projection it owes anyway
    looks: tuple[tuple[int, float], ...] = ()  # what looks in vain would cost with shortlists of other sizes
    whole: float = 0.0  # the whole vocabulary, beyond a look at a shortlist, for a token that stays after all

    def with_shortlist(self, size: int | None) -> "ExitCosts":
        """The costs with a shortlist of one of the sizes of `looks`; None: as they are."""
        if size is None:
            return self
        look = dict(self.looks)[size]
        return replace(self, projection=look, leaving=look, whole=self.projection)

    @property
    def listed(self) -> "ExitCosts":
        """The costs with the longest shortlist: a gate then tells about what all logits do by themselves."""
        return self.with_shortlist(max((size for size, _ in self.looks), default=None))


LEAST_SAVING: Final = 0.005
"""Share of the blocks below which exits pay for nothing but themselves."""

_NOTHING: Final = ExitCosts(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class ExitChoice:
    """The exits kept, by their place among the candidates, and what every single one would save by itself."""

    kept: tuple[int, ...]
    saving: float  # expected share of the blocks saved, net, averaged over the targets
    alone: tuple[float, ...]  # the same for each candidate as the only exit


def net_saving(
    view: GateView, threshold: float, depths: Sequence[int], blocks: int, costs: ExitCosts
) -> float:
    """The share of all block × token pairs saved at `threshold`, gates, vain projections and K/V paid for."""
    may_leave = view.reach[0] >= 0
    passing, saved = may_leave.copy(), 0.0
    for place, depth in enumerate(depths):
        leaves = passing & (view.reach[place] >= threshold)
        vain = passing & (view.looked[place] >= threshold) & ~leaves
        saved += (blocks - depth) * (1.0 - costs.skipped_kv) * int(leaves.sum())
        saved -= costs.gate * int(passing.sum()) + costs.projection * int(vain.sum())
        saved -= costs.leaving * int(leaves.sum())
        saved -= costs.whole * int((passing & (view.whole[place] >= threshold) & ~leaves).sum())
        passing &= ~leaves
    tokens = int(may_leave.sum())
    return saved / (tokens * blocks) if tokens else 0.0


def exit_sets(candidates: int) -> list[tuple[int, ...]]:
    """The sets of exits to choose between, by their places among the candidates: each alone, then several."""
    sizes = range(1, min(MOST_EXITS, candidates) + 1)
    return [places for size in sizes for places in combinations(range(candidates), size)]


def choose_exits(
    view: GateView,
    depths: Sequence[int],
    blocks: int,
    costs: ExitCosts,
    targets: Sequence[float],
    certify_tokens: int,
    confidence: float,
    advance: Callable[[int], None] = lambda _sets: None,
) -> ExitChoice:
    """The one or two exits that save most on average over `targets`, each at its loosest threshold that looks safe.

    Where none saves `LEAST_SAVING` the one that skips most blocks is kept, whatever it costs, so that the bundle has an
    exit to be asked for, and the same one on every such machine. `depths` are the
    blocks passed at each exit of `view`, ascending. `advance` is told each of the `exit_sets` when it is judged.
    """

    def saving(places: tuple[int, ...], costs: ExitCosts = costs) -> float:
        seen = view.only(places)
        forecast = forecast_of(seen, certify_tokens, confidence)
        at = [depths[place] for place in places]
        gains = []
        for target in targets:
            safe = forecast.safe(target)
            gain = net_saving(seen, forecast.thresholds[safe[-1]], at, blocks, costs) if safe else 0.0
            gains.append(max(gain, 0.0))  # a target that does not pay need not be asked for
        return float(np.mean(gains))

    savings: dict[tuple[int, ...], float] = {}
    for places in exit_sets(len(depths)):
        savings[places] = saving(places)
        advance(1)
    alone = tuple(savings[place,] for place in range(len(depths)))
    kept = max(savings, key=lambda several: savings[several])
    if savings[kept] < LEAST_SAVING:  # the costs decide nothing any more, so their noise must not
        kept = max(((place,) for place in range(len(depths))), key=lambda one: saving(one, _NOTHING))
    return ExitChoice(kept, savings[kept], alone)
