"""Drawing tokens: native against PyTorch, rows by themselves, and rows that are not usable."""

import pytest
import torch

from exeunt.kernels.token_draw import draw_tokens
from exeunt.kernels.token_draw.reference import draw_tokens_reference


def _keys(rows: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, 2), dtype=torch.int64).int()


@pytest.mark.parametrize("vocab", [1, 5, 37, 4096, 50_257])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_agrees_with_pytorch(seed: int, vocab: int, spread: float) -> None:
    rows = 40
    logits = torch.randn(rows, vocab) * spread
    scores = logits.clone()
    scores[::3, : vocab // 2] = -torch.inf
    temperatures = torch.tensor([0.0, 0.01, 0.7, 1.0, 3.0]).repeat(rows // 5)
    token_keys = torch.randint(-(2**31), 2**31, (vocab,), dtype=torch.int64).int()
    keys = _keys(rows)
    ids, logprobs = draw_tokens(logits, scores, temperatures, keys, token_keys)
    expected, expected_logprobs = draw_tokens_reference(logits, scores, temperatures, keys, token_keys)
    # Two tokens within float32's rounding of each other may fall to either: never seen more than once in a thousand.
    assert int((ids != expected).sum()) <= (1 if spread else 0)
    same = ids == expected
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=1e-4, rtol=1e-4)
    for row in (0, 7, 39):
        part = slice(row, row + 1)
        alone = draw_tokens(logits[part], scores[part], temperatures[part], keys[part], token_keys)
        assert torch.equal(alone[0], ids[part])
        assert torch.equal(alone[1], logprobs[part])


def test_equal_scores_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, 70)
    logits[0, [33, 34, 66]] = 5.0
    ids, _ = draw_tokens(logits, logits, torch.zeros(1), _keys(1), torch.zeros(70, dtype=torch.int32))
    assert ids.tolist() == [33]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_usable_says_so_alone(seed: int, bad: float, temperature: float) -> None:
    logits, keys, token_keys = torch.randn(5, 90), _keys(5), torch.arange(90, dtype=torch.int32) * 77_777
    temperatures = torch.full((5,), temperature)
    clean = draw_tokens(logits, logits, temperatures, keys, token_keys)
    logits[2, 89] = bad
    logits[3] = -torch.inf
    ids, logprobs = draw_tokens(logits, logits, temperatures, keys, token_keys)
    assert logprobs.isnan().tolist() == [False, False, True, True, False]
    keep = [0, 1, 4]
    assert torch.equal(ids[keep], clean[0][keep])
    assert torch.equal(logprobs[keep], clean[1][keep])


Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _with(arguments: Arguments, index: int, other: torch.Tensor) -> Arguments:
    a, b, c, d, e = (other if place == index else each for place, each in enumerate(arguments))
    return a, b, c, d, e


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    logits = torch.zeros(2, 8)
    good = (logits, logits, torch.zeros(2), _keys(2), torch.zeros(8, dtype=torch.int32))
    for index, bad in ((1, logits[:, :4]), (2, torch.zeros(1)), (3, _keys(3)), (4, good[4][:7])):
        with pytest.raises(ValueError, match="do not fit each other"):
            draw_tokens(*_with(good, index, bad))
    with pytest.raises(ValueError, match="do not fit each other"):
        draw_tokens(logits[:, :0], logits[:, :0], good[2], good[3], good[4][:0])
    for index in range(5):
        wrong = good[index].half() if index < 3 else good[index].long()
        with pytest.raises(TypeError, match="expected float32" if index < 3 else "expected int32"):
            draw_tokens(*_with(good, index, wrong))


@pytest.mark.parametrize("shift", [-100.0, 100.0])
@pytest.mark.parametrize("altered", [False, True])
def test_log_probabilities_do_not_depend_on_a_constant_added_to_the_logits(
    seed: int, shift: float, altered: bool
) -> None:
    rows, vocab = 40, 300
    logits = (
        torch.randn(rows, vocab) * 1024
    ).round() / 1024  # multiples of 2^-10: the shifted ones are exact too
    logits[:, 7] += torch.arange(rows) / 4
    keys, token_keys = _keys(rows), torch.arange(vocab, dtype=torch.int32) * 77_777
    temperatures = torch.tensor([0.0, 1.0]).repeat(rows // 2)
    scores = logits.clone()
    scores[
        :, 7
    ] = -torch.inf  # where the scores differ, their top is not the raw logits' and must not be used for it
    ids, logprobs = draw_tokens(logits, scores if altered else logits, temperatures, keys, token_keys)
    raw = logits + shift
    moved, moved_logprobs = draw_tokens(raw, scores if altered else raw, temperatures, keys, token_keys)
    assert torch.equal(moved, ids)
    assert torch.equal(moved_logprobs, logprobs)
    expected = raw.log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(moved_logprobs, expected, atol=2e-6, rtol=1e-6)
