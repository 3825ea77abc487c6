"""The sampler: it draws from p, p is what transformers computes, and a row's draw is its own affair."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from exeunt.kernels.token_draw.reference import exponential_noise
from exeunt.server.processed_scores import processed_scores
from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling, plain_draw, row_keys, token_keys
from exeunt.server.sampling import finished_draws, sample


def _row(
    position: int = 0, *, choice: int = 0, history: tuple[int, ...] = (), **params: object
) -> RowSampling:
    return RowSampling(SamplingParams(**params), choice, position, history)  # type: ignore[arg-type]


def _logits(rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


params = st.builds(
    SamplingParams,
    min_new_tokens=st.integers(0, 4),
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 4.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    top_k=st.integers(0, 60),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    seed=st.integers(0, 2**64 - 1),
    ignore_eos=st.booleans(),
)
sampling_rows = st.builds(
    RowSampling,
    params=params,
    choice=st.integers(0, 8),
    position=st.integers(0, 100_000),
    history=st.lists(st.integers(0, 49), max_size=8),
)


class TestDistribution:
    """Draws over many positions, seeds or choices follow p (chi-square, fixed seeds: not a matter of luck)."""

    @pytest.mark.parametrize("vary", ["position", "seed", "choice"])
    def test_draws_follow_p(self, vary: str) -> None:
        logits = _logits(1, 40, seed=3)
        draws = 10_000
        rows = [
            _row(
                index if vary == "position" else 7,
                choice=index if vary == "choice" else 0,
                seed=index if vary == "seed" else 11,
                temperature=1.3,
            )
            for index in range(draws)
        ]
        counts = torch.bincount(torch.tensor(sample(logits.expand(draws, -1), rows).ids), minlength=40)
        expected = (logits[0] / 1.3).double().softmax(-1) * draws
        assert _fit(counts, expected) > 1e-3

    def test_truncated_draws_follow_the_truncated_p(self) -> None:
        logits = _logits(1, 40, seed=4)
        rows = [_row(i, seed=5, temperature=0.8, top_k=12, top_p=0.9) for i in range(10_000)]
        counts = torch.bincount(torch.tensor(sample(logits.expand(len(rows), -1), rows).ids), minlength=40)
        p = _probabilities(logits, rows[:1])[0]
        assert 1 < int((p > 0).sum()) <= 12
        assert int(counts[p == 0].sum()) == 0
        assert _fit(counts[p > 0], p[p > 0].double() * len(rows)) > 1e-3

    def test_neighbouring_positions_are_independent(self) -> None:
        logits = torch.zeros(20_001, 8)
        ids = torch.tensor(sample(logits, [_row(i, seed=1, temperature=1.0) for i in range(20_001)]).ids)
        pairs = torch.bincount(ids[:-1] * 8 + ids[1:], minlength=64)
        assert _fit(pairs, torch.full((64,), 20_000 / 64, dtype=torch.float64)) > 1e-3

    def test_a_large_vocabulary(self) -> None:
        vocab, draws = 150_000, 60
        weights = torch.linspace(0.0, 2.0, vocab)
        rows = [_row(i, seed=9, temperature=1.0) for i in range(draws)]
        ids = [
            token
            for start in range(0, draws, 20)
            for token in sample(weights.log().expand(20, -1), rows[start : start + 20]).ids
        ]
        # The cumulative share of token t is (t / vocab)²: its root is uniform.
        assert stats.kstest([(t + 0.5) / vocab for t in ids], lambda x: x**2).pvalue > 1e-3
        assert max(ids) > 100_000

    def test_noise_is_standard_exponential(self) -> None:
        noise = _noise([_row(i, seed=2) for i in range(20)], 5_000).flatten()
        assert stats.kstest(noise.numpy(), "expon").pvalue > 1e-3
        assert float(noise.min()) > 0
        assert math.isfinite(float(noise.max()))


def test_noise_is_the_same_in_every_release() -> None:
    """A seed is a promise: a request repeated next year draws the same tokens."""
    rows = [_row(0, seed=1), _row(1000, choice=3, seed=2**64 - 1)]
    noise = _noise(rows, 150_000)[:, [0, 1, 2, 149_999]]
    promised = [
        [1.36267042, 1.11123276, 0.348338038, 0.220016092],
        [0.868917704, 0.0944077298, 0.29131192, 0.47198382],
    ]
    assert torch.equal(noise, torch.tensor(promised))


def _noise(rows: Sequence[RowSampling], vocab_size: int, device: str = "cpu") -> Tensor:
    rows = [row._replace(params=replace(row.params, temperature=1.0)) for row in rows]
    return exponential_noise(row_keys(rows).to(device), token_keys(vocab_size, torch.device(device)))


def _probabilities(logits: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """The distribution that each row draws from."""
    temperatures = torch.tensor([row.params.temperature for row in rows])[:, None]
    return (processed_scores(logits, rows) / temperatures).softmax(-1)


def _fit(counts: Tensor, expected: Tensor) -> float:
    """The chi-square test's p-value, rare outcomes pooled."""
    rare = expected < 5
    observed = torch.cat((counts[~rare].double(), counts[rare].sum()[None].double()))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    keep = wanted > 0
    observed, wanted = observed[keep], wanted[keep]
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


class TestRowsAreIndependent:
    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(sampling_rows, min_size=1, max_size=12), seed=st.integers(0, 1000))
    def test_alone_as_in_a_batch(self, rows: list[RowSampling], seed: int) -> None:
        logits = _logits(len(rows), 50, seed)
        together = sample(logits, rows, eos_token_ids=(3, 4))
        alone = [sample(logits[i : i + 1], [row], eos_token_ids=(3, 4)) for i, row in enumerate(rows)]
        assert together.ids == tuple(one.ids[0] for one in alone)
        assert together.logprobs == tuple(one.logprobs[0] for one in alone)

    def test_alone_as_in_a_batch_with_a_large_vocabulary(self) -> None:
        rows = [
            _row(5, seed=1, temperature=1.0, top_p=0.5),  # a nucleus among the candidates
            _row(6, seed=1, temperature=3.0, top_p=0.95),  # one that needs the whole vocabulary
            _row(7, seed=2, temperature=1.0, top_k=3000, top_p=0.9),
            _row(8, seed=2),
            _row(9, seed=3, temperature=0.7),
        ]
        logits = _logits(len(rows), 50_257)
        together = sample(logits, rows)
        for index, row in enumerate(rows):
            one = sample(logits[index : index + 1], [row])
            assert (one.ids[0], one.logprobs[0]) == (together.ids[index], together.logprobs[index])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_one_unusable_row_fails_alone(self, bad: float, temperature: float) -> None:
        rows = [_row(i, seed=4, temperature=temperature, top_p=0.9, top_k=20) for i in range(3)]
        logits = _logits(3, 50)
        clean = sample(logits, rows)
        logits[1, 17] = bad
        result = sample(logits, rows)
        assert [error is None for error in result.errors] == [True, False, True]
        assert result.ids[1] == -1
        assert math.isnan(result.logprobs[1])
        for index in (0, 2):
            assert (result.ids[index], result.logprobs[index]) == (clean.ids[index], clean.logprobs[index])

    def test_nothing_left_to_choose_is_an_error(self) -> None:
        result = sample(_logits(2, 2), [_row(min_new_tokens=1), _row()], eos_token_ids=(0, 1))
        assert result.errors[0] is not None
        assert result.errors[1] is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    def test_noise_and_draws_are_the_same_on_cuda(self) -> None:
        rows = [
            _row(i, seed=2**63 + i, choice=i % 3, temperature=0.9, top_p=0.8, top_k=500) for i in range(16)
        ]
        assert torch.equal(_noise(rows, 150_000), _noise(rows, 150_000, "cuda").cpu())
        logits = _logits(16, 150_000)
        assert sample(logits, rows).ids == sample(logits.cuda(), rows).ids


class TestProbabilities:
    @settings(max_examples=150, deadline=None)
    @given(
        temperature=st.floats(0.05, 4.0),
        top_k=st.integers(0, 70),
        top_p=st.floats(0.01, 1.0),
        penalty=st.floats(0.5, 2.0),
        history=st.lists(st.integers(0, 49), min_size=1, max_size=30),
        seed=st.integers(0, 10_000),
    )
    def test_as_in_transformers(
        self, temperature: float, top_k: int, top_p: float, penalty: float, history: list[int], seed: int
    ) -> None:
        logits = _logits(1, 50, seed)
        processors = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
        )
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        processors.append(TopPLogitsWarper(top_p))
        theirs = processors(torch.tensor([history]), logits.clone()).softmax(-1)
        row = _row(
            history=tuple(history),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty,
        )
        ours = _probabilities(logits, [row])
        differ = ((ours > 0) != (theirs > 1e-30)) & (theirs.maximum(ours) > 1e-30)
        if differ.any():  # only where the mass before a token equals top_p to rounding
            descending = theirs.maximum(ours)[0].sort(descending=True).values.double()
            assert (descending.cumsum(0) - descending - top_p).abs().min() < 1e-5
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize(
        ("top_k", "kept"), [(1, [2]), (2, [0, 2, 4]), (3, [0, 2, 4]), (4, [0, 1, 2, 3, 4])]
    )
    def test_ties_with_the_kth_stay(self, top_k: int, kept: list[int]) -> None:
        logits = torch.tensor([[2.0, 1.0, 3.0, 1.0, 2.0, 0.0]])
        p = _probabilities(logits, [_row(temperature=1.0, top_k=top_k)])
        assert p[0].nonzero().flatten().tolist() == kept

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.001, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.9, 4)]
    )
    @pytest.mark.parametrize("vocab", [4, 5000])
    def test_the_nucleus_includes_what_reaches_top_p_and_takes_ties_by_lower_id(
        self, top_p: float, kept: int, vocab: int
    ) -> None:
        logits = torch.full((1, vocab), -torch.inf)
        logits[0, -4:] = 0.0
        p = _probabilities(logits, [_row(temperature=1.0, top_p=top_p)])
        assert p[0].nonzero().flatten().tolist() == [vocab - 4 + i for i in range(kept)]
        assert float(p.sum()) == pytest.approx(1.0)

    def test_a_large_nucleus_takes_ties_by_lower_id(self) -> None:
        p = _probabilities(torch.zeros(1, 8192), [_row(temperature=1.0, top_p=0.5)])
        assert p[0].nonzero().flatten().tolist() == list(range(4096))

    @settings(max_examples=100, deadline=None)
    @given(
        vocab=st.integers(1, 400),
        distinct=st.integers(1, 40),
        top_p=st.lists(st.floats(0.001, 0.999), min_size=1, max_size=4),
        spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
        seed=st.integers(0, 10_000),
    )
    def test_the_nucleus_is_that_of_a_stable_sort(
        self, vocab: int, distinct: int, top_p: list[float], spread: float, seed: int
    ) -> None:
        """The nucleus is found without sorting the vocabulary; a plain sort must find the same, ties included."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(distinct, generator=generator) * spread
        logits = values[torch.randint(distinct, (len(top_p), vocab), generator=generator)]
        ours = _probabilities(logits, [_row(temperature=1.0, top_p=mass) for mass in top_p])
        for row, mass in enumerate(top_p):
            p = logits[row].softmax(-1).double()
            order = p.sort(descending=True, stable=True).indices
            before = p[order].cumsum(0) - p[order]
            if (before - mass).abs().min() < 1e-7:  # the edge itself is a matter of rounding
                continue
            assert ours[row].nonzero().flatten().tolist() == sorted(order[before < mass].tolist())

    def test_a_tiny_temperature_is_greedy_and_a_small_one_does_not_overflow(self) -> None:
        logits = _logits(2, 50, spread=1e4)
        result = sample(logits, [_row(temperature=1e-9), _row(temperature=1.1e-5)])
        assert list(result.ids) == logits.argmax(-1).tolist()
        assert result.errors == (None, None)


class TestParameters:
    def test_greedy_is_argmax_lowest_id_first_with_the_raw_logprob(self) -> None:
        logits = _logits(4, 4096)
        logits[0, 40] = logits[0, 30] = 99.0
        result = sample(logits.bfloat16(), [_row(i) for i in range(4)])
        wide = logits.bfloat16().float()
        assert list(result.ids) == wide.argmax(-1).tolist()
        assert result.ids[0] == 30
        expected = wide.log_softmax(-1).amax(-1)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected)

    def test_a_temperature_below_the_least_takes_the_lowest_of_equals_and_the_least_one_draws(self) -> None:
        rows = [_row(3, temperature=temperature, seed=2) for temperature in (0.0, 0.99e-5, 1e-5)]
        ids = sample(torch.zeros(3, 1000), rows).ids
        assert ids[:2] == (0, 0)
        assert ids[2] > 0

    def test_logprob_is_of_the_raw_logits_whatever_the_parameters(self) -> None:
        logits = _logits(1, 50)
        row = _row(temperature=0.3, top_k=4, repetition_penalty=1.7, history=tuple(range(50)), seed=8)
        result = sample(logits, [row])
        assert result.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[0, result.ids[0]]))

    def test_min_new_tokens_rules_out_the_end_of_text(self) -> None:
        logits = torch.zeros(4, 6)
        logits[:, 5] = 50.0
        rows = [
            _row(1, min_new_tokens=2),
            _row(2, min_new_tokens=2),
            _row(1, min_new_tokens=2, ignore_eos=True),
            _row(1, min_new_tokens=2, temperature=1.0),
        ]
        ids = sample(logits, rows, eos_token_ids=(5,)).ids
        assert ids[:3] == (0, 5, 5)
        assert ids[3] != 5

    def test_repetition_penalty_acts_on_greedy_rows_too(self) -> None:
        logits = torch.tensor([[3.0, 2.0, -1.0], [-3.0, -2.0, -2.5]])
        rows = [_row(history=(0, 0), repetition_penalty=2.0), _row(history=(1,), repetition_penalty=2.0)]
        assert sample(logits, rows).ids == (1, 2)

    def test_the_logits_are_left_as_they_were(self) -> None:
        logits = _logits(2, 50)
        before = logits.clone()
        sample(
            logits, [_row(temperature=1.0, top_k=3, top_p=0.5, repetition_penalty=2.0, history=(1,)), _row()]
        )
        assert torch.equal(logits, before)

    def test_rows_and_logits_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(2, 5\) were given for 1 rows"):
            sample(torch.zeros(2, 5), [_row()])

    def test_no_rows(self) -> None:
        assert sample(torch.zeros(0, 5), []).ids == ()


VOCAB = 40


class TestPlainDraw:
    """Draws from logits as they are: what describes them, and for which rows that is all there is."""

    @pytest.mark.parametrize(
        ("changes", "plain"),
        [
            ({}, True),
            ({"temperature": 0.7}, True),
            ({"temperature": 0.7, "top_k": VOCAB}, True),
            ({"temperature": 0.7, "top_k": VOCAB - 1}, False),
            ({"temperature": 0.7, "top_p": 0.99}, False),
            ({"temperature": 1e-6, "top_k": 2, "top_p": 0.1}, True),  # greedy
            ({"repetition_penalty": 1.1}, False),
            ({"min_new_tokens": 4}, False),
            ({"min_new_tokens": 3}, True),  # has as many
            ({"min_new_tokens": 4, "ignore_eos": True}, True),
        ],
    )
    def test_it_is_all_there_is_where_no_step_changes_scores(
        self, changes: dict[str, Any], plain: bool
    ) -> None:
        row = RowSampling(SamplingParams(**changes), 0, 3)
        found = plain_draw(row, VOCAB, ends=True)
        assert (found is not None) == plain
        if found is not None:
            logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
            assert processed_scores(logits, [row], [5]) is logits
            assert found.temperature == (0.0 if row.greedy else row.params.temperature)
            assert [found.first_key, found.second_key] == row_keys([row])[0].tolist()

    def test_without_ends_none_is_ruled_out(self) -> None:
        row = RowSampling(SamplingParams(min_new_tokens=4), 0, 3)
        assert plain_draw(row, VOCAB, ends=False) is not None

    def test_a_row_without_a_logprob_has_an_error(self) -> None:
        drawn = finished_draws([3, 4], [-0.5, math.nan])
        assert drawn.ids is None
        told = drawn.wait()
        assert told.ids == (3, -1)
        assert told.errors[0] is None
        assert told.errors[1] is not None
