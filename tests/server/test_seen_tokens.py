"""The tokens of a growing text, each once, whatever was asked before."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import sample
from exeunt.server.seen_tokens import SeenTokens

TOKENS = st.lists(st.integers(0, 20), max_size=6)


@given(steps=st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 12)), min_size=1, max_size=12))
def test_it_is_what_the_text_holds_up_to_there(steps: list[tuple[list[int], list[int], int]]) -> None:
    seen, confirmed = SeenTokens(), [3]
    for more, drafts, fewer in steps:
        confirmed += more
        tokens = confirmed + drafts
        for end in (len(tokens), max(len(tokens) - fewer, 0), len(tokens)):
            found = seen.up_to(tokens, end, len(confirmed))
            assert found.dtype == np.int32
            assert set(found.tolist()) == set(tokens[:end])


def test_what_was_given_out_stays_as_it_is() -> None:
    seen, tokens = SeenTokens(), list(range(60))
    first = seen.up_to(tokens, 60, 60)
    tokens += range(100, 300)
    assert set(seen.up_to(tokens, 260, 260).tolist()) == set(tokens)
    assert first.tolist() == list(range(60))


def test_a_long_text_is_read_once() -> None:
    class Counted(list[int]):
        read = 0

        def __getitem__(self, where):  # type: ignore[no-untyped-def]
            found = super().__getitem__(where)
            Counted.read += len(found) if isinstance(where, slice) else 1
            return found

    seen, tokens = SeenTokens(), Counted(range(5000))
    seen.up_to(tokens, 5000, 5000)
    Counted.read = 0
    for token in range(50):
        tokens.append(token)
        assert len(seen.up_to(tokens, len(tokens), len(tokens))) == 5000
    assert Counted.read <= 100


def test_a_penalty_reads_an_array_as_it_reads_a_list() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.7, repetition_penalty=1.8, seed=4)
    histories = [[1, 5, 5, 30], [], [39]]
    as_lists = sample(logits, [RowSampling(params, 0, 2, each) for each in histories])
    arrays = [np.unique(np.array(each, np.int32)) for each in histories]
    assert sample(logits, [RowSampling(params, 0, 2, each) for each in arrays]) == as_lists
