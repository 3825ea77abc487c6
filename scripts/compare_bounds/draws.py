"""Simulated texts: blocks of tokens that differ in how many leave early and in how often that costs much."""

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from exeunt.calibration.nll_risk import CLIP, NllCounts
from exeunt.calibration.risk import Counts

BLOCK: Final = 256  # tokens
_SURPRISE: Final = 1.2  # nats, the mean cost of a token that leaves wrongly, before the clip
_NOISE: Final = 0.25  # nats, the spread of what others cost or gain
_SHAPE: Final = 2.0  # of the gamma distribution of exits over blocks: their spread is 0.7 of their mean
_TOKENS_AT_ONCE: Final = 2_000_000  # drawn at once


@dataclass(frozen=True, slots=True)
class Text:
    """What a text is drawn from.

    By block of 256 tokens a gamma-Poisson number leaves, `exits` on average, of which a beta-binomial share costs an
    exponential number of nats, clipped: `wrong` on average, correlated within a block at `correlation`. What the others
    cost is symmetric around zero.
    """

    exits: float
    wrong: float
    correlation: float

    @property
    def increase(self) -> float:
        """The true mean clipped increase, nats per token."""
        return float(
            _mean_left(self.exits) * self.wrong * _SURPRISE * (1.0 - np.exp(-CLIP / _SURPRISE)) / BLOCK
        )

    def draw(self, generator: np.random.Generator, texts: int, blocks: int) -> "Draws":
        """So many texts of so many blocks."""
        at_once = max(1, int(_TOKENS_AT_ONCE / (self.exits * blocks)))
        parts = [
            self._drawn(generator, min(at_once, texts - first), blocks) for first in range(0, texts, at_once)
        ]
        sums, squares, exits = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Draws(sums, squares, exits)

    def _drawn(
        self, generator: np.random.Generator, texts: int, blocks: int
    ) -> tuple[Counts, Counts, Counts]:
        """Sums, their squares and exits, each [texts, blocks]."""
        left = _left(self.exits, generator, (texts, blocks))
        odds = 1.0 / self.correlation - 1.0
        wrong = generator.beta(self.wrong * odds, (1.0 - self.wrong) * odds, left.shape)
        own = np.repeat(np.arange(left.size), left.ravel())
        costly = generator.random(len(own)) < np.repeat(wrong.ravel(), left.ravel())
        cost = np.where(
            costly,
            np.minimum(generator.exponential(_SURPRISE, len(own)), CLIP),
            generator.laplace(0.0, _NOISE / np.sqrt(2.0), len(own)).clip(-CLIP, CLIP),
        )

        def summed(values: Counts) -> Counts:
            return np.bincount(own, values, left.size).reshape(texts, blocks).astype(np.float64)

        return summed(cost), summed(np.square(cost)), left.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Draws:
    """Simulated texts: by text and block the sum of increases, of their squares, and exits, each [texts, blocks]."""

    sums: Counts
    squares: Counts
    exits: Counts

    def counts(self, text: int) -> NllCounts:
        """One text as calibration counts it."""
        tokens = np.full(self.sums.shape[1], float(BLOCK))
        return NllCounts(self.sums[text], self.sums[text], 3.0 * tokens, self.exits[text], tokens)


def _left(exits: float, generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many tokens of each block leave."""
    rate = exits * generator.gamma(_SHAPE, 1.0 / _SHAPE, shape)
    return generator.poisson(rate).clip(max=BLOCK)


@cache
def _mean_left(exits: float) -> float:
    """Its mean: less than `exits`, for a block has no more than its tokens."""
    return float(_left(exits, np.random.default_rng(77), (1_000_000,)).mean())
