"""How often text is called safe whose risk lies in a rare kind of document that the split may have none of."""

from dataclasses import dataclass

import numpy as np

from exeunt.calibration import nll_risk, risk
from scripts.compare_bounds.draws import BLOCK

_EXITS = 30.0  # mean of a document's early tokens, Poisson


@dataclass(frozen=True, slots=True)
class RareDocuments:
    """A mixture: the `share` of documents whose early tokens differ at the rate `wrong`, and cost `nats` a token."""

    share: float
    wrong: float = 1.0
    nats: float = 0.0

    @property
    def disagreement(self) -> float:
        """The true risk of an early token."""
        return self.share * self.wrong

    @property
    def increase(self) -> float:
        """The true mean increase, nats per token."""
        return self.share * self.nats

    def disagreement_passes(self, generator: np.random.Generator, documents: int, target: float) -> bool:
        """Whether one certify split is called safe, errors' correlation estimated on a select split half as large."""
        seen, other = self._counts(generator, documents), self._counts(generator, documents // 2)
        return risk.upper_bound(seen, risk.error_correlation(other)) <= target

    def increase_passes(self, generator: np.random.Generator, documents: int, target: float) -> bool:
        """The same for the NLL increase."""
        tokens = np.full(documents, float(BLOCK))
        sums = np.where(generator.random(documents) < self.share, self.nats * tokens, 0.0)
        counts = nll_risk.NllCounts(sums, sums, 3.0 * tokens, np.full(documents, _EXITS), tokens)
        bound = nll_risk.upper_bound(counts)
        return bound is not None and bound <= target

    def _counts(self, generator: np.random.Generator, documents: int) -> risk.ExitCounts:
        rate = np.where(generator.random(documents) < self.share, self.wrong, 0.0)
        exits = generator.poisson(_EXITS, documents).clip(min=1)
        wrong = generator.binomial(exits, rate)
        return risk.ExitCounts(exits.astype(np.float64), wrong.astype(np.float64), documents * BLOCK)


def passing(mixture: RareDocuments, documents: int, target: float, draws: int, seed: int) -> float:
    """The share of draws that are called safe at `target`: of the NLL increase where the mixture costs any, else of
    disagreement."""
    generator = np.random.default_rng(seed)
    passes = mixture.increase_passes if mixture.nats else mixture.disagreement_passes
    return sum(passes(generator, documents, target) for _ in range(draws)) / draws
