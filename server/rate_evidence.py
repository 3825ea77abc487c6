"""What a stream of yes-or-no observations says of their rate, whenever one looks. No torch.

*The bounds.* A confidence sequence by the method of mixtures (Robbins, Annals of Mathematical Statistics 41 (1970)
1397-1409), for sub-Bernoulli observations as in Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics 49 (2021)
1055-1080; for yes-or-no observations each tilt of the mixture is a betting strategy of Waudby-Smith and Ramdas, JRSS B
86 (2024) 1-27. With S of t observations positive, a tilt a and a rate m,

    K(m) = exp(a S) / (1 + m (exp(a) - 1))^t

is what a gambler owns who bets against the rate m, one coin at the start. Averaged over fixed tilts, all positive, it
is large where the rate is above m (all negative: below m). With p_i the probability of observation i given all that
went before, exp(a S) / prod(1 + p_i (exp(a) - 1)) is a martingale; log(1 + p (exp(a) - 1)) is concave in p, so K(m) is
at most that where m is the mean of the p_i, and by Ville's inequality exceeds 1 / (1 - confidence), ever, with
probability 1 - confidence at most. So the bounds hold for the mean of the rates that the observations really had, at
all times at once, for dependent observations and for rates that drift. They are about that past, not the future.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE: Final = 0.95
_TILTS: Final = 0.1 * 1.6 ** np.arange(9)
"""From odds a tenth above (or below) those of the rate to 73 times: each mixture is sharp from a few observations on,
and gives up log(9) against the best of them."""


def log_capital(hits: ArrayLike, tokens: ArrayLike, rate: ArrayLike, *, above: bool) -> NDArray[np.float64]:
    """Log of what bets against `rate` have brought, broadcast over the arguments: evidence that the rate is higher.

    With `above` False: that it is lower. `hits` of `tokens` observations were positive; rates are in [0, 1].
    """
    tilts = _TILTS if above else -_TILTS
    s, t, m = (np.asarray(each, dtype=np.float64)[..., None] for each in (hits, tokens, rate))
    with np.errstate(
        divide="ignore"
    ):  # a rate of 1 leaves nothing of a steep bet below: minus infinity is right
        each = tilts * s - t * np.log1p(m * np.expm1(tilts))
    best: NDArray[np.float64] = each.max(-1)
    total: NDArray[np.float64] = best + np.log(np.exp(each - best[..., None]).mean(-1))
    return total


@dataclass(slots=True)
class RateEvidence:
    """Counts of one stream of observations, and the bounds that they allow. Both bounds hold at all times."""

    tokens: int = 0
    hits: int = 0

    def add(self, *, hit: bool) -> None:
        """One more observation."""
        self.tokens += 1
        self.hits += int(hit)

    def exceeds(self, rate: float) -> bool:
        """Whether the lower bound of the rate is above `rate`."""
        return bool(log_capital(self.hits, self.tokens, rate, above=True) > _ENOUGH)

    def stays_below(self, rate: float) -> bool:
        """Whether the upper bound of the rate is below `rate`."""
        return bool(log_capital(self.hits, self.tokens, rate, above=False) > _ENOUGH)

    def lower(self) -> float:
        """The lower bound of the rate, to 1e-6, rounded down."""
        if not self.exceeds(0.0):
            return 0.0
        low, high = 0.0, 1.0
        while high - low > _PRECISION:
            middle = (low + high) / 2
            low, high = (middle, high) if self.exceeds(middle) else (low, middle)
        return low

    def upper(self) -> float:
        """The upper bound of the rate, to 1e-6, rounded up."""
        low, high = 0.0, 1.0
        if not self.stays_below(1.0):
            return 1.0
        while high - low > _PRECISION:
            middle = (low + high) / 2
            low, high = (low, middle) if self.stays_below(middle) else (middle, high)
        return high


_ENOUGH: Final = float(-np.log1p(-CONFIDENCE))
_PRECISION: Final = 1e-6
