"""Which exit drafts for the verified mode: the one expected to give most tokens per time at one stream.

A cycle of the verified mode drafts j tokens and confirms them: j + 1 shallow passes of one token each, a gate asked
behind each of them until it says no or the longest draft is reached, and one deep pass over j + 1 tokens. With p the
share of the tokens that the gate lets the exit draft, a the share of drafts that are right and k the longest draft,

    P(j) = (1 - p) pʲ for j < k, pᵏ for j = k,        tokens(j) = 1 + a + ... + aʲ = (1 - aʲ⁺¹) / (1 - a)

and speed is the mean of tokens(j) over the mean time of a cycle. Both shares are taken as independent from token to
token, which is on the careful side: in text, tokens that are easy to draft come in runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from exeunt.calibration.thresholds import GateView

MOST_DRAFTS: Final = 8
"""The longest draft looked at."""
DEEP_TOKENS: Final = (1, 2, 3, 5, 9)
"""Tokens of the deep passes that are timed, up to those of the longest draft; between them times are interpolated."""
DRAFT_SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Shares of the tokens that a gate may let an exit draft: one threshold is looked at for each."""


@dataclass(frozen=True, slots=True)
class PassCosts:
    """Times of one stream over that of a token without drafts (embedding, all blocks, the model's own head).

    By depth in blocks: `shallow`, one token through the embedding and the blocks in front of the exit; `deep`, as many
    tokens of one row as `DEEP_TOKENS` says through the blocks behind it and the head.
    """

    gate: float  # a whole gate that looks at nobody
    projection: float  # what a look costs more: at the whole vocabulary, or at a shortlist
    shallow: Mapping[int, float]
    deep: Mapping[int, tuple[float, ...]]
    whole: float = 0.0  # the whole vocabulary, beyond a look at a shortlist
    looks: tuple[tuple[int, float], ...] = ()  # what looks would cost with shortlists of other sizes

    def with_shortlist(self, size: int | None) -> "PassCosts":
        """The costs with a shortlist of one of the sizes of `looks`; None: as they are."""
        if size is None:
            return self
        return replace(self, projection=dict(self.looks)[size], whole=self.projection)

    @property
    def listed(self) -> "PassCosts":
        """The costs with the longest shortlist: a gate then tells about what all logits do by themselves."""
        return self.with_shortlist(max((size for size, _ in self.looks), default=None))

    def deep_pass(self, depth: int, tokens: int) -> float:
        """The time of a pass over `tokens` tokens from `depth` blocks on."""
        return float(np.interp(tokens, DEEP_TOKENS, self.deep[depth]))


@dataclass(frozen=True, slots=True)
class DraftRates:
    """What a gate makes of tokens at one threshold, as shares: looked at, drafted, and of the drafted ones right.

    `whole` is the share that is projected onto the whole vocabulary.
    """

    threshold: float
    looked: float
    drafted: float
    acceptance: float
    whole: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """The best way to draft at one exit. `speed` is the expected ratio to no drafts."""

    rates: DraftRates
    length: int
    speed: float


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The exit that drafts, by its place among the candidates, and the best plan of each of them."""

    place: int
    plans: tuple[DraftPlan, ...]

    @property
    def plan(self) -> DraftPlan:
        """That of the exit chosen."""
        return self.plans[self.place]


def draft_speed(rates: DraftRates, depth: int, length: int, costs: PassCosts) -> float:
    """Tokens per time with drafts of up to `length` tokens at the exit behind `depth` blocks, over that without."""
    drafts = np.arange(length + 1)
    chance = (1.0 - rates.drafted) * rates.drafted**drafts
    chance[-1] = rates.drafted**length
    tokens = np.cumsum(rates.acceptance**drafts)
    asked = np.minimum(drafts + 1, length)
    deep = np.array([costs.deep_pass(depth, int(each) + 1) for each in drafts])
    gate = costs.gate + rates.looked * costs.projection + rates.whole * costs.whole
    seconds = (drafts + 1) * costs.shallow[depth] + asked * gate + deep
    return float(chance @ tokens / (chance @ seconds))


def draft_rates(view: GateView, place: int) -> list[DraftRates]:
    """What the gate of one exit of `view` makes of its tokens, at a threshold for each of `DRAFT_SHARES`."""
    may_leave = view.reach[place] >= 0
    reach, looked, whole = (each[place][may_leave] for each in (view.reach, view.looked, view.whole))
    agrees = view.agrees[place][may_leave]
    quantiles = np.quantile(reach, 1.0 - np.array(DRAFT_SHARES))
    thresholds = [0.0, *(np.floor(each * 1e4) / 1e4 for each in quantiles[1:])]
    found = []
    for threshold in dict.fromkeys(float(each) for each in thresholds):
        drafted = reach >= threshold
        found.append(
            DraftRates(
                threshold,
                float((looked >= threshold).mean()),
                float(drafted.mean()),
                float(agrees[drafted].mean()),
                float((whole >= threshold).mean()),
            )
        )
    return found


def choose_drafting(view: GateView, depths: Sequence[int], costs: PassCosts) -> DraftChoice:
    """The exit, threshold and longest draft that are expected to be fastest; below 1 the least slow.

    `depths` are the blocks passed at each exit of `view`. Whether drafts pay at all is for the server to find out: its
    own costs, other streams and other text are not known here.
    """
    plans = tuple(
        max(
            (
                DraftPlan(rates, length, draft_speed(rates, depth, length, costs))
                for rates in draft_rates(view, place)
                for length in range(1, MOST_DRAFTS + 1)
            ),
            key=lambda plan: plan.speed,
        )
        for place, depth in enumerate(depths)
    )
    place = max(range(len(plans)), key=lambda each: plans[each].speed)
    return DraftChoice(place, plans)
