"""A shortlist decides by its own tokens, and only what leaves is projected onto all."""

from dataclasses import replace

import pytest
import torch

from exeunt.compression.exit_output import ExitOutput, Shortlist
from exeunt.compression.exits import (
    ExitHeadError,
    ExitJudge,
)
from tests.compression.exit_heads import (
    HIDDEN,
    SHORTLIST,
    VOCAB,
    CountingOutput,
    counted_output,
    exit_head,
    exit_judge,
    exit_outputs,
    naive_gate,
)


@pytest.mark.parametrize("judged", [False, True])
def test_a_shortlist_of_all_tokens_is_none_to_the_bit(judged: bool) -> None:
    plain = replace(exit_head(), judge=exit_judge() if judged else None)
    listed = replace(plain, shortlist=Shortlist(torch.arange(VOCAB)))
    hidden = torch.randn(21, HIDDEN, generator=torch.Generator().manual_seed(7))
    for output in exit_outputs(torch.float32):
        without, given = (head.gate(hidden, torch.full((21,), 0.5), output) for head in (plain, listed))
        assert 0 < int(without.leaves.sum()) < 21
        assert torch.equal(given.confidence, without.confidence)
        assert torch.equal(given.leaves, without.leaves)
        assert torch.equal(given.looked, without.looked)
        assert torch.equal(given.logits, without.logits)


def test_a_shortlist_decides_by_its_own_tokens_and_says_what_all_say() -> None:
    """Confidence is that of a model with no other tokens; whoever leaves has the whole vocabulary's logits."""
    head = replace(exit_head(screen_ratio=0.0), shortlist=SHORTLIST)
    hidden = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(8))
    output, few = CountingOutput(), CountingOutput()
    few.weight = output.weight[SHORTLIST.ids]
    result = head.gate(hidden, torch.full((40,), 0.6), output)
    _, confidences, _ = naive_gate(head, hidden, few.weight)
    _, _, logits = naive_gate(head, hidden, output.weight)
    # the log-odds of a few tokens soon reach float32's cap
    torch.testing.assert_close(result.confidence, torch.tensor(confidences), rtol=1e-4, atol=1e-3)
    assert 0 < int(result.leaves.sum()) < 40
    torch.testing.assert_close(result.logits.double(), logits[result.leaves], rtol=1e-4, atol=1e-4)
    outside = ~torch.isin(result.logits.argmax(-1), SHORTLIST.ids)
    assert bool(outside.any()), "no token that left lies outside the shortlist: the test shows nothing"


def test_exits_and_variants_share_the_rows_of_one_shortlist() -> None:
    output = exit_outputs(torch.float32)[1]
    again, other = ExitOutput(output.linear, torch.float32), Shortlist(torch.tensor([1, 2]))
    same = Shortlist(SHORTLIST.ids.clone())
    picked = output.only(SHORTLIST)
    assert output.only(same) is again.only(same) is picked
    assert output.only(other) is not picked
    assert output.shortlist_bytes > again.shortlist_bytes > 0
    # INT4 comes in panels of some outputs: nine rows take a whole one or two
    assert again.shortlist_bytes < output.linear.nbytes
    with pytest.raises(ValueError, match="names token 40, the output matrix has 37"):
        output.only(Shortlist(torch.tensor([3, 40])))


def test_what_is_no_shortlist_is_refused() -> None:
    for ids in ([4], [3, 3], [5, 2], [-1, 4], [[1, 2]]):
        with pytest.raises(ValueError, match="shortlist"):
            Shortlist(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Shortlist(torch.tensor([1.0, 2.0]))
    with pytest.raises(ExitHeadError, match="the judge looks at 5 tokens, the shortlist has 2"):
        replace(exit_head(), judge=exit_judge(), shortlist=Shortlist(torch.tensor([1, 2])))
    judge = ExitJudge(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3), torch.zeros(()))
    with pytest.raises(ExitHeadError, match="the judge reads 3 units, the probe has 16"):
        replace(exit_head(), judge=judge)


def test_only_rows_that_leave_are_projected_onto_all_tokens() -> None:
    (output, asked), head = counted_output(), replace(exit_head(), shortlist=SHORTLIST)
    hidden = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(11))
    result = head.gate(hidden, torch.full((30,), 0.5), output)
    left = int(result.leaves.sum())
    assert 0 < left < len(result.looked) < 30
    assert asked == [(len(result.looked), len(SHORTLIST)), (left, VOCAB)]
    asked.clear()
    nobody = replace(head, screen_ratio=0.0).gate(hidden, torch.full((30,), 1.5), output)
    assert nobody.logits.shape[0] == 0
    assert asked == [(30, len(SHORTLIST))], "a look in vain costs the shortlist alone"
