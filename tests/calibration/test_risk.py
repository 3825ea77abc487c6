"""The test behind certificates: its coverage on correlated text, and what the sequence does with it."""

from decimal import Decimal

import numpy as np
import pytest
from scipy import stats

from exeunt.calibration.risk import (
    LEAST_BLOCKS,
    ExitCounts,
    above,
    design_effect,
    disagreement_sequence,
    error_correlation,
    p_value,
    upper_bound,
)


def draw(
    generator: np.random.Generator, risk: float, rho: float, blocks: int, exits: float = 15.0
) -> ExitCounts:
    """Blocks of text that differ in how many tokens leave (gamma-Poisson) and in how often wrongly (beta)."""
    left = generator.poisson(exits * generator.gamma(1.5, 1 / 1.5, blocks)).clip(max=256)
    own_risk = generator.beta(risk * (1 / rho - 1), (1 - risk) * (1 / rho - 1), blocks)
    return ExitCounts(left.astype(float), generator.binomial(left, own_risk).astype(float), blocks * 256)


def counts(exits: list[float], errors: list[float]) -> ExitCounts:
    return ExitCounts(np.array(exits), np.array(errors), len(exits) * 256)


@pytest.mark.parametrize("risk", [0.01, 0.02, 0.1])
@pytest.mark.parametrize("rho", [0.01, 0.1])
@pytest.mark.parametrize(("blocks", "exits"), [(20, 15), (24, 60), (48, 15), (48, 60), (100, 30), (200, 15)])
def test_coverage_on_correlated_blocks(risk: float, rho: float, blocks: int, exits: int) -> None:
    """At a risk equal to the target, at most 5 % of texts may be called safe (plus what 1000 draws leave open).

    The correlation is measured on half as many blocks, as on the select split.
    """
    generator = np.random.default_rng(11)
    called_safe = 0
    for _ in range(1000):
        correlation = error_correlation(draw(generator, risk, rho, blocks // 2, exits=exits))
        called_safe += p_value(draw(generator, risk, rho, blocks, exits=exits), risk, correlation) <= 0.05
    assert called_safe / 1000 <= 0.05 + 2.5 * (0.05 * 0.95 / 1000) ** 0.5


@pytest.mark.parametrize("blocks", [60, 200])
def test_coverage_gives_way_where_rare_errors_cling_together(blocks: int) -> None:
    """Beyond the correlations above the bound is not kept: how far it gives way is what the documentation says."""
    generator = np.random.default_rng(11)
    called_safe = 0
    for _ in range(1500):
        correlation = error_correlation(draw(generator, 0.01, 0.2, 60))
        called_safe += p_value(draw(generator, 0.01, 0.2, blocks), 0.01, correlation) <= 0.05
    assert called_safe / 1500 <= 0.08


def test_the_test_finds_what_is_safe() -> None:
    """It is not so careful as to certify nothing: half the target is nearly always found safe."""
    generator = np.random.default_rng(5)
    found = sum(p_value(draw(generator, 0.025, 0.05, 150), 0.05, 0.05) <= 0.05 for _ in range(200))
    assert found > 150


def test_naive_independence_would_not_cover() -> None:
    """The same draws judged as independent tokens are called safe far too often: the design effect matters."""
    generator = np.random.default_rng(11)
    naive = 0
    for _ in range(500):
        seen = draw(generator, 0.1, 0.2, 100, exits=60)
        naive += float(stats.binom.cdf(seen.wrong, seen.total, 0.1)) <= 0.05
    assert naive / 500 > 0.15


def test_the_p_value_and_the_bound_agree() -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        seen = draw(generator, 0.04, 0.05, 80)
        bound = upper_bound(seen, 0.05)
        assert p_value(seen, bound, 0.05) == pytest.approx(0.05, abs=1e-6)
        assert p_value(seen, bound + 0.01, 0.05) < 0.05 < p_value(seen, bound - 0.01, 0.05)


def test_independent_tokens_give_the_exact_binomial_bound() -> None:
    """One token to a block and many blocks: Clopper and Pearson's figure."""
    seen = counts([1.0] * 4000, [1.0] * 20 + [0.0] * 3980)
    exact = stats.beta.ppf(0.95, 21, 3980)
    assert upper_bound(seen, 0.0) == pytest.approx(float(exact), rel=2e-3)


def test_design_effect_of_blocks_that_err_together() -> None:
    together = counts([10.0] * 50, [10.0] * 5 + [0.0] * 45)
    assert design_effect(together, 0.0) == pytest.approx(10.0, rel=0.05)
    assert error_correlation(together) == pytest.approx(1.0, rel=0.05)
    spread = counts([10.0] * 50, [1.0] * 50)
    assert design_effect(spread, 0.0) == 1.0
    assert design_effect(counts([10.0] * 50, [0.0] * 50), 0.2) == pytest.approx(1 + 9 * 0.2)


def test_too_few_blocks_certify_nothing() -> None:
    assert upper_bound(counts([200.0] * (LEAST_BLOCKS - 1), [0.0] * (LEAST_BLOCKS - 1)), 0.0) == 1.0
    assert upper_bound(counts([200.0] * LEAST_BLOCKS, [0.0] * LEAST_BLOCKS), 0.0) < 0.01


def test_no_exits_at_all() -> None:
    nobody = counts([0.0] * 40, [0.0] * 40)
    assert nobody.risk is None
    assert p_value(nobody, 0.5, 0.0) == 1.0


SAFE = counts([20.0] * 100, [0.0] * 100)
UNSAFE = counts([20.0] * 100, [10.0] * 100)


def test_the_sequence_keeps_the_loosest_before_the_first_failure() -> None:
    sequence = disagreement_sequence(0.05, begin=0.9, correlation=0.0)
    sequence.test(0.95, UNSAFE)  # stricter than where it begins: passed over
    sequence.test(0.9, SAFE)
    sequence.test(0.8, SAFE)
    assert sequence.open
    sequence.test(0.7, UNSAFE)
    assert not sequence.open
    sequence.test(0.6, SAFE)  # after a failure nothing counts any more
    certificate = sequence.certificate
    assert (certificate.certified, certificate.threshold, certificate.exits) == (True, 0.8, 2000)
    assert certificate.upper_bound is not None
    assert certificate.upper_bound <= 0.05


def test_a_sequence_that_fails_at_once_says_why() -> None:
    sequence = disagreement_sequence(0.05, begin=0.9, correlation=0.0)
    sequence.test(0.9, UNSAFE)
    certificate = sequence.certificate
    assert not certificate.certified
    assert certificate.reason is not None
    assert "1000 of the 2000 tokens that left differ" in certificate.reason
    few = disagreement_sequence(0.05, begin=0.9, correlation=0.0)
    few.test(0.9, counts([3.0] * 5, [0.0] * 5))
    assert "only 15 tokens in 5 blocks" in str(few.certificate.reason)


@pytest.mark.parametrize(
    ("bound", "target", "said"),
    [(0.034, 0.02, "3.4%"), (0.02003, 0.02, "2.003%"), (0.0204, 0.02, "2.04%"), (0.02, 0.02, "2.0%")],
)
def test_a_bound_that_is_too_high_is_seen_to_be(bound: float, target: float, said: str) -> None:
    assert above(bound, target, 1, "%") == said


def test_every_target_is_seen_to_be_exceeded() -> None:
    for thousandth in range(1, 1000):
        target = thousandth / 1000
        said = above(target + 1e-6, target, 1, "%")
        assert Decimal(said.removesuffix("%")) > Decimal(thousandth) / 10
        assert above(target + 1e-6, target, 4, "f") > f"{target:.4f}"


def test_the_whole_sequence_rarely_certifies_a_threshold_whose_risk_is_above_the_target() -> None:
    """Risk rises as thresholds loosen; nested exits, correlated errors, the target at the sixth of ten steps."""
    generator = np.random.default_rng(7)
    target, wrongly = 0.05, 0
    risks = np.linspace(0.01, 0.09, 10)
    for _ in range(400):
        sequence = disagreement_sequence(target, begin=1.0, correlation=0.05)
        exits, errors = np.zeros(80), np.zeros(80)
        worst = 0.0
        for step, risk in enumerate(risks):
            more = draw(generator, risk, 0.05, 80, exits=6.0)
            exits, errors = exits + more.exits, errors + more.errors
            sequence.test(1.0 - 0.05 * step, ExitCounts(exits, errors, 80 * 256))
            if sequence.open:
                worst = float(risks[: step + 1].mean())  # the true risk of what has left so far
        wrongly += worst > target
    assert wrongly / 400 <= 0.05 + 2.5 * (0.05 * 0.95 / 400) ** 0.5
