"""What stages cost on this machine, learned as they run: seconds against tokens, by variant. Plain Python, no torch."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final

from exeunt.compression.variant import Variant

PROMPT_TOKENS: Final = 48  # runs of more, where that is far more than rows, hold a prompt's chunk
_MEMORY: Final = 0.98  # what an observation is worth after each later one: some fifty count
_PRIOR_TOKENS: Final = 0.5  # spread of token counts, in tokens², at which data outweighs the prior slope
_PRIOR_SLOPE: Final = 0.25  # of a token's mean cost, as long as no prompt has shown what one more costs
_OUTLIER: Final = 2.0  # a run that took so many times what was expected was held up by something else
_KNOWN: Final = 8.0  # weight from which outliers are told
_SHOWN: Final = 4  # steps begun ahead that show what such steps take
_STEP_SHARE: Final = 0.1  # of a mean of steps that is the last one's
_FRESH: Final = 512  # ticks for which what they have shown counts
_RARELY: Final = 4096  # as _FRESH, of steps that wait: beside steps begun ahead none are seen


@dataclass(slots=True)
class LinearCost:
    """Seconds of a run of n tokens, as base + slope × n: least squares over what was seen lately."""

    weight: float = 0.0
    tokens: float = 0.0  # weighted means
    seconds: float = 0.0
    each: float | None = None  # seconds of one more token where many are computed together
    _warm: bool = False
    _spread: float = 0.0  # weighted sums of centred products
    _product: float = 0.0

    def learn(self, tokens: int, seconds: float, *, prompt: bool = False) -> None:
        """One run took so long; of a `prompt` it tells what a token more costs, and nothing of a step."""
        if prompt:
            each = seconds / tokens
            self.each = each if self.each is None else min(0.8 * self.each + 0.2 * each, _OUTLIER * self.each)
            return
        if not self._warm:  # a first run fills caches and tables
            self._warm = True
            return
        if self.weight >= _KNOWN and seconds > _OUTLIER * self._at_least(tokens):
            seconds = min(seconds, _OUTLIER * self.of(tokens))
        self.weight = self.weight * _MEMORY + 1.0
        off_tokens, off_seconds = tokens - self.tokens, seconds - self.seconds
        self.tokens += off_tokens / self.weight
        self.seconds += off_seconds / self.weight
        self._spread = self._spread * _MEMORY + off_tokens * (tokens - self.tokens)
        self._product = self._product * _MEMORY + off_tokens * (seconds - self.seconds)

    def _at_least(self, tokens: int) -> float:
        """What `of` does not fall below whatever the slope, told by less arithmetic: this is asked for every run."""
        return self.seconds if tokens >= self.tokens else self.seconds * tokens / self.tokens

    @property
    def slope(self) -> float:
        """Seconds that one more token costs; between 0 and all that a token has cost."""
        if not self.tokens:
            return 0.0
        each = self.seconds / self.tokens
        pull = _PRIOR_TOKENS / max(self.weight, 1.0)
        spread = self._spread / max(self.weight, 1.0)
        product = self._product / max(self.weight, 1.0)
        prior = _PRIOR_SLOPE * each if self.each is None else min(self.each, each)
        slope = (product + pull * prior) / (spread + pull)
        return min(max(slope, 0.0), each)

    @property
    def base(self) -> float:
        """Seconds of a run whatever its size."""
        return max(self.seconds - self.slope * self.tokens, 0.0)

    def of(self, tokens: float) -> float:
        """Seconds that a run of so many tokens is expected to take."""
        slope = self.slope  # `base` would work it out again, and this is asked several times a tick
        return max(self.seconds - slope * self.tokens, 0.0) + slope * tokens


@dataclass(slots=True)
class StepCost:
    """What whole decode steps of about as many rows take: a weighted mean of what was seen within `fresh` ticks."""

    fresh: int
    _seconds: float = 0.0
    _steps: int = 0
    _last: int = 0

    def learn(self, seconds: float, tick: int) -> None:
        """A step took so long."""
        if tick - self._last > self.fresh:
            self._steps = 0
        self._steps, self._last = self._steps + 1, tick
        if self._steps <= 2:  # the first is held up by what is begun or ended with it
            self._seconds = seconds
        else:
            self._seconds += _STEP_SHARE * (min(seconds, _OUTLIER * self._seconds) - self._seconds)

    def seconds(self, tick: int) -> float | None:
        """Seconds of a step; None where too few were seen, or none for long."""
        return self._seconds if self._steps > _SHOWN and tick - self._last <= self.fresh else None


def _class_of(variant: Variant, rows: int) -> tuple[Variant, int]:
    return variant, (rows - 1).bit_length()


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """What a decode step of one sequence costs, its share of the batch's fixed costs included, in seconds.

    Known only when `seen`; `shallow` is the part up to the drafting exit with all that surrounds a tick, `deep` the
    fixed cost of the part behind it, and `token` what one more token costs there.
    """

    seen: bool
    shallow: float = 0.0
    shallow_token: float = 0.0
    deep: float = 0.0
    token: float = 0.0
    gate: float = 0.0


@dataclass(slots=True)
class StageCosts:
    """The costs of every stage of every variant, of gates, of what surrounds a tick, and of whole decode steps.

    Those steps draft nothing. `waiting` are begun in their turn, `ahead` before it, one behind the other. They are
    known by variant and powers of two of rows: what one row takes says nothing of 32.
    """

    stages: dict[tuple[Variant, int], LinearCost] = field(default_factory=lambda: defaultdict(LinearCost))
    gates: dict[tuple[Variant, int], LinearCost] = field(default_factory=lambda: defaultdict(LinearCost))
    around: LinearCost = field(default_factory=LinearCost)
    waiting: dict[tuple[Variant, int], StepCost] = field(
        default_factory=lambda: defaultdict(lambda: StepCost(_RARELY))
    )
    ahead: dict[tuple[Variant, int], StepCost] = field(
        default_factory=lambda: defaultdict(lambda: StepCost(_FRESH))
    )
    _ticks: int = 0

    def ran(self, variant: Variant, stage: int, tokens: int, seconds: float, rows: int = 1) -> None:
        """A stage was run over so many tokens of so many rows."""
        prompt = tokens > PROMPT_TOKENS and tokens > 2 * rows
        self.stages[variant, stage].learn(tokens, seconds, prompt=prompt)

    def asked(self, variant: Variant, stage: int, rows: int, seconds: float) -> None:
        """A gate was asked about so many rows."""
        self.gates[variant, stage].learn(rows, seconds)

    def ticked(self, rows: int, seconds: float) -> None:
        """A tick of so many rows, begun in its turn, took so much time besides its stages and gates."""
        self._ticks += 1
        self.around.learn(rows, seconds)

    def stepped(self, variant: Variant, rows: int, seconds: float, *, ahead: bool) -> None:
        """A decode step of so many rows, which drafted nothing, took so long, all that surrounds it included."""
        self._ticks += ahead  # the others are ticks in their turn
        (self.ahead if ahead else self.waiting)[_class_of(variant, rows)].learn(seconds, self._ticks)

    def head_start(self, variant: Variant, rows: int) -> float:
        """Seconds that a decode step of so many rows gains where it is begun ahead.

        Infinite where that is to be tried: until a few have shown what they take, and when that was long ago. What
        surrounds a tick as long as too few are known that waited.
        """
        kind = _class_of(variant, rows)
        ahead, waiting = self.ahead[kind].seconds(self._ticks), self.waiting[kind].seconds(self._ticks)
        if ahead is None:
            return math.inf
        return self.around.seconds if waiting is None else max(waiting - ahead, 0.0)

    def begun_ahead(self, variant: Variant, rows: int) -> float | None:
        """A row's share of a step of so many rows that is begun ahead, in seconds; None where it is not known."""
        seconds = self.ahead[_class_of(variant, rows)].seconds(self._ticks)
        return None if seconds is None else seconds / rows

    def drafting(self, variant: Variant, stage: int, last: int) -> DraftCosts:
        """The costs of drafting at the end of `stage` of stages 0 to `last`."""
        shallow = [self.stages[variant, s] for s in range(stage + 1)]
        deep = [self.stages[variant, s] for s in range(stage + 1, last + 1)]
        if any(cost.weight < 1.0 for cost in (*shallow, *deep)):
            return DraftCosts(seen=False)
        gate = self.gates[variant, stage]
        return DraftCosts(
            seen=True,
            shallow=sum(_share(cost) for cost in (*shallow, self.around)),
            shallow_token=sum(cost.slope for cost in shallow),
            deep=sum(cost.base / max(cost.tokens, 1.0) for cost in deep),
            token=sum(cost.slope for cost in deep),
            gate=_share(gate) if gate.weight else 0.0,
        )


def _share(cost: LinearCost) -> float:
    """A token's share of a run of the usual size."""
    return cost.seconds / max(cost.tokens, 1.0)
