"""Draws, penalties and cuts in Triton: against PyTorch, rows by themselves, odd rows."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from exeunt.kernels.token_draw.reference import draw_tokens_reference
from exeunt.kernels.token_draw.scores import (
    penalise_scores,
    penalise_scores_reference,
    truncate_scores,
    truncate_scores_reference,
)
from exeunt.kernels.token_draw.scores_triton import penalise_scores_triton, truncate_scores_triton
from exeunt.kernels.token_draw.triton import draw_tokens_triton
from tests.kernels.triton.on_gpu import on_gpu_only
from tests.kernels.triton.score_cuts import HARD, assert_cut_alike, limits_of

# The interpreter computes with numpy, which warns of what kernels do on purpose: NaN and infinity in arithmetic.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("seed", "poisoned"),
]


def _keys(*shape: int, device: str) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int().to(device)


class TestDraw:
    @pytest.mark.parametrize(
        ("vocab", "spread"),
        [
            *((vocab, 1.0) for vocab in (1, 5, 1024, 5003)),
            *((vocab, spread) for vocab in (5, 1024) for spread in (0.0, 30.0)),
            *(on_gpu_only(vocab, spread) for vocab in (1, 5003) for spread in (0.0, 30.0)),
        ],
    )
    def test_agrees_with_pytorch(self, device: str, vocab: int, spread: float) -> None:
        rows = 20 if device == "cuda" else 10
        logits = torch.randn(rows, vocab, device=device) * spread
        scores = logits.clone()
        scores[::3, : vocab // 2] = -torch.inf
        temperatures = torch.tensor([0.0, 0.01, 0.7, 1.0, 3.0], device=device).repeat(rows // 5)
        keys, token_keys = _keys(rows, 2, device=device), _keys(vocab, device=device)
        ids, logprobs = draw_tokens_triton(logits, scores, temperatures, keys, token_keys)
        expected, expected_logprobs = draw_tokens_reference(logits, scores, temperatures, keys, token_keys)
        # Two tokens within float32's rounding of each other may fall to either.
        assert int((ids != expected).sum()) <= (1 if spread else 0)
        same = ids == expected
        torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=1e-4, rtol=1e-4)
        for row in (0, 7, rows - 1):
            part = slice(row, row + 1)
            alone = draw_tokens_triton(logits[part], scores[part], temperatures[part], keys[part], token_keys)
            assert torch.equal(alone[0], ids[part])
            assert torch.equal(alone[1], logprobs[part])

    def test_rows_do_not_see_each_other(self, device: str) -> None:
        logits = torch.randn(33, 1500, device=device)
        temperatures = torch.tensor([0.0, 0.5, 1.3], device=device).repeat(11)
        keys, token_keys = _keys(33, 2, device=device), _keys(1500, device=device)
        ids, logprobs = draw_tokens_triton(logits, logits, temperatures, keys, token_keys)
        for count in (1, 2, 3, 16, 17) if device == "cuda" else (1, 17):
            part = (logits[-count:], logits[-count:], temperatures[-count:], keys[-count:])
            fewer, fewer_logprobs = draw_tokens_triton(*part, token_keys)
            assert torch.equal(fewer, ids[-count:])
            assert torch.equal(fewer_logprobs, logprobs[-count:])

    def test_equal_scores_go_to_the_lower_id(self, device: str) -> None:
        logits = torch.zeros(1, 3000, device=device)
        logits[0, [1033, 1034, 2500]] = 5.0
        cold, token_keys = torch.zeros(1, device=device), torch.zeros(3000, dtype=torch.int32, device=device)
        ids, _ = draw_tokens_triton(logits, logits, cold, _keys(1, 2, device=device), token_keys)
        assert ids.tolist() == [1033]
        # with one key for all tokens their noise is the same too
        ids, _ = draw_tokens_triton(logits, logits, cold + 1, _keys(1, 2, device=device), token_keys)
        assert ids.tolist() == [1033]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_a_row_that_is_not_usable_says_so_alone(
        self, device: str, bad: float, temperature: float
    ) -> None:
        logits, keys = torch.randn(6, 1090, device=device), _keys(6, 2, device=device)
        token_keys = _keys(1090, device=device)
        temperatures = torch.full((6,), temperature, device=device)
        clean = draw_tokens_triton(logits, logits, temperatures, keys, token_keys)
        logits[2, 1089] = bad
        logits[3] = -torch.inf
        scores = logits.clone()
        scores[4] = -torch.inf
        ids, logprobs = draw_tokens_triton(logits, scores, temperatures, keys, token_keys)
        assert logprobs.isnan().tolist() == [False, False, True, True, True, False]
        assert bool(((ids >= 0) & (ids < 1090)).all())
        keep = [0, 1, 5]
        assert torch.equal(ids[keep], clean[0][keep])
        assert torch.equal(logprobs[keep], clean[1][keep])

    @pytest.mark.parametrize("shift", [-100.0, 100.0])
    def test_a_constant_added_to_the_logits_changes_nothing(self, device: str, shift: float) -> None:
        logits = (torch.randn(8, 1300, device=device) * 1024).round() / 1024
        rest = (
            torch.tensor([0.0, 1.0] * 4, device=device),
            _keys(8, 2, device=device),
            _keys(1300, device=device),
        )
        ids, logprobs = draw_tokens_triton(logits, logits, *rest)
        moved, moved_logprobs = draw_tokens_triton(logits + shift, logits + shift, *rest)
        assert torch.equal(moved, ids)
        assert torch.equal(moved_logprobs, logprobs)

    def test_no_rows_views_and_shapes_without_data(self, device: str) -> None:
        logits, token_keys = torch.randn(40, 3, device=device).T, _keys(40, device=device)
        rest = (torch.ones(3, device=device), _keys(3, 2, device=device), token_keys)
        found = draw_tokens_triton(logits, logits, *rest)
        dense = draw_tokens_triton(logits.contiguous(), logits.contiguous(), *rest)
        assert torch.equal(found[0], dense[0])
        assert torch.equal(found[1], dense[1])
        assert draw_tokens_triton(logits[:0], logits[:0], rest[0][:0], rest[1][:0], token_keys)[0].shape == (
            0,
        )
        with FakeTensorMode():
            fake = torch.empty(3, 40, device=device)
            keys = torch.empty(3, 2, dtype=torch.int32, device=device)
            ids, logprobs = draw_tokens_triton(
                fake, fake, fake[:, 0], keys, torch.empty(40, dtype=torch.int32, device=device)
            )
            assert ids.shape == logprobs.shape == (3,)
            assert ids.dtype == torch.int64


class TestTruncation:
    @pytest.mark.parametrize("vocab", [1, 6, 300, 9001])
    def test_cuts_what_pytorch_cuts(self, device: str, vocab: int) -> None:
        scores = torch.randn(len(HARD), vocab, device=device) * 3
        limits = limits_of(HARD, device)
        found = truncate_scores_triton(scores, *limits)
        assert_cut_alike(found, truncate_scores_reference(scores, *limits), scores, limits)
        assert torch.equal(found[[3, 4]], scores[[3, 4]])
        assert bool(found.isfinite().any(1).all())
        for row in (0, 2, 9) if device == "cuda" else (2,):
            part = slice(row, row + 1)
            assert torch.equal(truncate_scores_triton(scores[part], *(x[part] for x in limits)), found[part])

    def test_ties(self, device: str) -> None:
        scores = torch.tensor(
            [
                [0.0] * 8,  # all alike: half the mass is the first four
                [0.0] * 8,  # ties with the third stay
                [1.0, 3.0, 2.0, 2.0, 2.0, 0.0, -torch.inf, 2.0],  # the second is one of four
                [-0.0, 0.0, -0.0, -1.0, -2.0, -3.0, -4.0, -5.0],  # zero is zero
                [0.0, 0.0, 0.0, 0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf],
                [5.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf],
                [1e30, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # one huge
                [-3e38, -3e38, -2e38, 0.0, 1.0, 3e38, 3e38, -torch.inf],
            ],
            device=device,
        )
        limits = limits_of(
            [
                (1.0, 0, 0.5),
                (1.0, 3, 1.0),
                (1.0, 2, 1.0),
                (1.0, 2, 1.0),
                (2.0, 0, 0.75),
                (1.0, 3, 0.5),
                (1.0, 3, 0.9),
                (1.0, 0, 0.5),
            ],
            device,
        )
        found = truncate_scores_triton(scores, *limits).isfinite()
        kept = [row.nonzero().flatten().tolist() for row in found]
        assert kept == [[0, 1, 2, 3], list(range(8)), [1, 2, 3, 4, 7], [0, 1, 2], [0, 1, 2], [0], [0], [5]]
        assert torch.equal(found, truncate_scores_reference(scores, *limits).isfinite())

    def test_limits_that_lie_on_the_border(self, device: str) -> None:
        """A hair more mass than two of four have takes a third; as many tokens as there are is no limit."""
        scores = torch.zeros(1, 4, device=device)
        found = truncate_scores_triton(scores, *limits_of([(1.0, 0, 0.5 + 2**-42)], device))
        assert found[0].isfinite().tolist() == [True, True, True, False]
        scores[0, 1] = -200.0  # has a probability of 0 in float32
        assert torch.equal(truncate_scores_triton(scores, *limits_of([(1.0, 4, 1.0)], device)), scores)

    def test_ties_in_a_large_nucleus_go_to_the_lower_ids(self, device: str) -> None:
        vocab = 16_384  # a power of two: each probability, and their sums, are exact
        scores = torch.full((2, vocab), 1.5, device=device)
        found = truncate_scores_triton(scores, *limits_of([(1.0, 0, 0.75), (1.0, 0, 1 / vocab)], device))
        assert found[0].isfinite().nonzero().flatten().tolist() == list(range(vocab * 3 // 4))
        assert found[1].isfinite().nonzero().flatten().tolist() == [0]

    def test_few_distinct_values(self, device: str) -> None:
        scores = torch.randint(-3, 3, (len(HARD), 700), device=device).float()
        limits = limits_of(HARD, device)
        found, expected = truncate_scores_triton(scores, *limits), truncate_scores_reference(scores, *limits)
        # one token's mass may round to either side of the border
        assert int((found.isfinite() != expected.isfinite()).sum(1).max()) <= 1

    def test_rows_do_not_see_each_other(self, device: str) -> None:
        scores = torch.randn(20, 1030, device=device)
        limits = limits_of([HARD[index % len(HARD)] for index in range(20)], device)
        whole = truncate_scores_triton(scores, *limits)
        for count in (1, 2, 17) if device == "cuda" else (1, 2):
            part = truncate_scores_triton(scores[-count:], *(x[-count:] for x in limits))
            assert torch.equal(part, whole[-count:])
        scores[2, 5], scores[5, 1], scores[10] = torch.nan, torch.inf, -torch.inf
        spoilt = truncate_scores_triton(scores, *limits)
        assert not bool(spoilt[[2, 5, 10]].isfinite().any())
        keep = [row for row in range(20) if row not in (2, 5, 10)]
        assert torch.equal(spoilt[keep], whole[keep])

    def test_float32_limits_no_rows_views_and_shapes_without_data(self, device: str) -> None:
        scores = torch.randn(50, 4, device=device).T
        temperatures, top_k, top_p = limits_of(
            [(1.0, 0, 0.5), (1.0, 4, 1.0), (1.0, 4, 0.5), (1.0, 0, 1.0)], device
        )
        found = truncate_scores_triton(scores, temperatures, top_k, top_p.float())
        assert torch.equal(found, truncate_scores_triton(scores.contiguous(), temperatures, top_k, top_p))
        assert truncate_scores_triton(scores[:0], temperatures[:0], top_k[:0], top_p[:0]).shape == (0, 50)
        with FakeTensorMode():
            fake = torch.empty(4, 50, device=device)
            limit = torch.empty(4, dtype=torch.int32, device=device)
            assert truncate_scores_triton(fake, fake[:, 0], limit, fake[:, 0]).shape == (4, 50)

    def test_what_does_not_fit_is_refused(self, device: str) -> None:
        scores, limits = torch.zeros(2, 5, device=device), limits_of(HARD[:2], device)
        with pytest.raises(ValueError, match=r"temperatures is \[1\], expected \[2\]"):
            truncate_scores(scores, limits[0][:1], *limits[1:])
        with pytest.raises(ValueError, match=r"expected \[rows, vocab\]"):
            truncate_scores(scores[0], *limits)
        with pytest.raises(TypeError, match="expected a vector of int32"):
            truncate_scores(scores, limits[0], limits[1].long(), limits[2])
        with pytest.raises(TypeError, match=r"scores are torch\.float64"):
            truncate_scores(scores.double(), *limits)
        with pytest.raises(TypeError, match="expected float32 and float"):
            truncate_scores(scores, limits[0].double(), *limits[1:])


class TestPenalties:
    def test_agrees_with_pytorch(self, device: str) -> None:
        vocab, ends = 3000, [7, 2999]
        logits = torch.randn(4, vocab, device=device) * 3
        logits[2, 5] = torch.nan
        histories = [[7, 5, 7, 1, 2999], [], torch.randint(0, vocab, (2500,)).tolist(), [5, 7, 9]]
        penalties = (1.3, 2.0, 0.8, 1.0)
        starts = torch.tensor([0, *(len(history) for history in histories)]).cumsum(0).int()
        arguments = (
            torch.tensor(
                [token for history in histories for token in history], dtype=torch.int32, device=device
            ),
            starts.to(device),
            torch.tensor(penalties, device=device),
            torch.tensor(ends, dtype=torch.int32, device=device),
            torch.tensor([True, True, False, False], device=device),
        )
        before = logits.clone()
        found = penalise_scores_triton(logits, *arguments)
        torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
        expected = penalise_scores_reference(logits, *arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert bool(found[:2, ends].isinf().all())

    def test_nothing_seen_nothing_masked_no_rows_and_shapes_without_data(self, device: str) -> None:
        logits = torch.randn(2, 50, device=device)
        none = torch.empty(0, dtype=torch.int32, device=device)
        starts = torch.zeros(3, dtype=torch.int32, device=device)
        penalties, masks = (
            torch.full((2,), 1.5, device=device),
            torch.ones(2, dtype=torch.bool, device=device),
        )
        assert torch.equal(penalise_scores_triton(logits, none, starts, penalties, none, masks), logits)
        found = penalise_scores_triton(logits[:0], none, starts[:1], penalties[:0], none, masks[:0])
        assert found.shape == (0, 50)
        padded = torch.tensor([-1, 50, 1 << 30], dtype=torch.int32, device=device)
        outside = starts + torch.tensor([0, 0, 3], dtype=torch.int32, device=device)
        assert torch.equal(penalise_scores_triton(logits, padded, outside, penalties, none, masks), logits)
        with FakeTensorMode():
            fake, few = torch.empty(2, 50, device=device), torch.empty(3, dtype=torch.int32, device=device)
            flags = torch.empty(2, dtype=torch.bool, device=device)
            found = penalise_scores_triton(fake, few, few, fake[:, 0], few, flags)
            assert (found.shape, found.dtype) == ((2, 50), torch.float32)

    def test_what_does_not_fit_is_refused(self, device: str) -> None:
        logits, none = torch.zeros(2, 5, device=device), torch.zeros(0, dtype=torch.int32, device=device)
        starts, penalties = torch.zeros(3, dtype=torch.int32, device=device), torch.ones(2, device=device)
        masks = torch.zeros(2, dtype=torch.bool, device=device)
        with pytest.raises(ValueError, match=r"starts is \[2\], expected \[3\]"):
            penalise_scores(logits, none, starts[:2], penalties, none, masks)
        with pytest.raises(TypeError, match="history is"):
            penalise_scores(logits, none.long(), starts, penalties, none, masks)
        with pytest.raises(TypeError, match=r"masks_eos torch\.int8"):
            penalise_scores(logits, none, starts, penalties, none, masks.char())
