"""The bound on the mean NLL increase: coverage on correlated heavy-tailed text, power, and what is said of it."""

import numpy as np
import pytest
from scipy import stats

from exeunt.calibration.nll_risk import CLIP, NllCounts, forecast_bound, interval, nll_sequence, upper_bound
from exeunt.calibration.risk import LEAST_BLOCKS
from scripts.compare_bounds.bounds import BOUNDS
from scripts.compare_bounds.draws import Text

TEXTS = 800
LIMIT = 0.05 + 2.5 * (0.05 * 0.95 / TEXTS) ** 0.5  # what so many draws leave open


def certified(name: str, text: Text, blocks: int, over: float = 1.0, seed: int = 11) -> float:
    """The share of texts that a bound certifies for `over` times their true increase."""
    draws = text.draw(np.random.default_rng(seed), TEXTS, blocks)
    return float(BOUNDS[name](draws, over * text.increase).mean())


@pytest.mark.parametrize(
    "text", [Text(12, 0.2, 0.1), Text(30, 0.1, 0.05), Text(60, 0.2, 0.1), Text(100, 0.3, 0.05)]
)
@pytest.mark.parametrize("blocks", [40, 120])
def test_coverage_on_correlated_blocks(text: Text, blocks: int) -> None:
    """At an increase equal to the target, at most 5 % of texts may be called safe, plus what the draws leave open."""
    assert certified("worst block once more", text, blocks) <= LIMIT


@pytest.mark.parametrize("text", [Text(12, 0.2, 0.1), Text(30, 0.1, 0.05), Text(60, 0.2, 0.1)])
@pytest.mark.parametrize("blocks", [LEAST_BLOCKS, 25, 30])
def test_coverage_on_few_blocks(text: Text, blocks: int) -> None:
    """With as few blocks as are allowed at all the bound is an approximation: a point above 5 % is what is stated."""
    assert certified("worst block once more", text, blocks) <= LIMIT + 0.01
    assert certified("Student", text, blocks) > certified("worst block once more", text, blocks)


@pytest.mark.parametrize("name", ["tokens as independent", "Student"])
def test_what_is_usual_would_not_cover(name: str) -> None:
    """Independent tokens are called safe far too often, and Student's bound over blocks too where they are skewed."""
    assert certified(name, Text(60, 0.2, 0.1), 40) > 1.15 * LIMIT
    if name == "tokens as independent":
        assert certified(name, Text(60, 0.2, 0.1), 120) > 0.2


def test_blocks_of_one_document_are_no_independent_draws() -> None:
    """Thirty documents of four blocks each, alike within a document: documents as units cover, their blocks do not."""
    g, by_block, by_document = np.random.default_rng(8), 0, 0
    for _ in range(TEXTS):
        own = g.gamma(3.0, 1.0 / 3.0, (30, 1))
        sums = g.gamma(4.0, 1.0 / 4.0, (30, 4)) * own  # 1 on average
        blocks, documents = (
            upper_bound(counts(sums.ravel().tolist())),
            upper_bound(counts(sums.mean(1).tolist())),
        )
        assert blocks is not None
        assert documents is not None
        by_block += blocks <= 1.0 / 250
        by_document += documents <= 1.0 / 250
    assert by_document / TEXTS <= LIMIT
    assert by_block / TEXTS > 2 * LIMIT


def test_what_is_safe_is_found() -> None:
    """It is not so careful as to certify nothing, as bounds are that allow for the worst block there could be."""
    text = Text(60, 0.2, 0.05)
    assert certified("worst block once more", text, 120, over=1.5) > 0.9
    assert certified("betting", text, 120, over=1.5) < 0.1
    assert certified("Bernstein", text, 120, over=1.5) < 0.1


def test_the_whole_sequence_rarely_certifies_a_threshold_whose_increase_is_above_the_target() -> None:
    """Thresholds from strict to loose let more leave, and cost more a token; the target lies at the fourth of eight."""
    texts = [Text(exits, 0.05 + 0.03 * step, 0.05) for step, exits in enumerate(np.linspace(10, 45, 8))]
    steps = [text.draw(np.random.default_rng(3 + place), 400, 80) for place, text in enumerate(texts)]
    target, wrongly = texts[3].increase, 0
    for number in range(400):
        sequence = nll_sequence(target, begin=1.0)
        for place, draws in enumerate(steps):
            sequence.test(0.9 - 0.05 * place, draws.counts(number))
        threshold = sequence.certificate.threshold
        wrongly += threshold is not None and threshold <= 0.9 - 0.05 * 3
    assert wrongly / 400 <= 0.05 + 2.5 * (0.05 * 0.95 / 400) ** 0.5


def counts(sums: list[float], exits: float = 4.0, tokens: float = 250.0) -> NllCounts:
    size = np.full(len(sums), 1.0)
    return NllCounts(np.array(sums), 2.0 * np.array(sums), 2.5 * tokens * size, exits * size, tokens * size)


def test_the_bound_is_students_with_the_worst_block_twice() -> None:
    """With equal blocks the ratio is a mean, and the bound Student's of the sample with its largest value repeated."""
    g = np.random.default_rng(0)
    sums = g.gamma(1.0, 2.0, 50)
    more = np.append(sums, sums.max()) / 250.0
    expected = more.mean() + stats.t.ppf(0.95, 49) * more.std(ddof=1) / np.sqrt(51)
    assert upper_bound(counts(sums.tolist())) == pytest.approx(expected, rel=1e-12)


def test_more_text_like_it_gives_a_lower_bound() -> None:
    seen = counts(np.random.default_rng(1).gamma(1.0, 2.0, 40).tolist())
    once, twice, often = (forecast_bound(seen, growth) for growth in (0.4, 2.0, 8.0))
    assert once == upper_bound(seen)
    assert once is not None
    assert twice is not None
    assert often is not None
    assert once > twice > often > seen.increase


def test_too_few_blocks_with_an_exit_certify_nothing_and_say_so() -> None:
    few = counts([0.0] * 100)
    few.exits[LEAST_BLOCKS - 1 :] = 0.0
    assert upper_bound(few) is None
    sequence = nll_sequence(0.05, begin=0.9)
    sequence.test(0.9, few)
    assert not sequence.certificate.certified
    assert (
        "only 76 tokens in 19 blocks of text left, and 20 blocks are needed: calibrate with more text"
        in str(sequence.certificate.reason)
    )


def test_the_sequence_keeps_the_loosest_before_the_first_failure() -> None:
    sequence = nll_sequence(0.02, begin=0.9)
    sequence.test(0.95, counts([100.0] * 50))  # stricter than where it begins: passed over
    sequence.test(0.9, counts([1.0] * 50))
    sequence.test(0.8, counts([2.0] * 50))
    sequence.test(0.7, counts([100.0] * 50))
    sequence.test(0.6, counts([1.0] * 50))  # after a failure nothing counts any more
    found = sequence.certificate
    assert (found.certified, found.threshold) == (True, 0.8)
    assert found.increase == pytest.approx(2.0 / 250)
    assert found.perplexity == pytest.approx(np.exp(2.5 + 4.0 / 250))
    assert found.full_perplexity == pytest.approx(np.exp(2.5))
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(np.exp(4.0 / 250))


def test_a_sequence_that_fails_at_once_says_why() -> None:
    sequence = nll_sequence(0.02, begin=0.9)
    sequence.test(0.9, counts([10.0] * 50))
    found = sequence.certificate
    assert found.threshold is None
    assert "200 of 12500 tokens left, the mean increase of 0.0400 nats may be as high as 0.0400" in str(
        found.reason
    )
    assert "no threshold was strict enough" in str(nll_sequence(0.02, begin=0.9).certificate.reason)


def test_the_interval_covers_the_unclipped_mean() -> None:
    """A heavy tail beyond the clip: Student's interval of the plain mean holds it about as often as it says."""
    g, held = np.random.default_rng(4), 0
    for _ in range(500):
        sums = g.gamma(2.0, 1.5, 80)
        seen = NllCounts(sums.clip(max=CLIP), sums, sums, np.ones(80), np.ones(80))
        found = interval(seen)
        assert found is not None
        held += found.low <= 3.0 <= found.high
    assert 0.92 <= held / 500 <= 0.98
    assert interval(counts([1.0])) is None
