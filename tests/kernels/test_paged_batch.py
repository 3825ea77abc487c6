"""A batch of which some tokens are missing keeps the others where they are."""

import pickle

import torch

from exeunt.kernels.paged_batch import PagedBatch


def _batch() -> PagedBatch:
    return PagedBatch(
        torch.tensor([4, 0, 1, 7]),
        torch.tensor([20, 8, 9, 31]),
        torch.tensor([0, 1, 3, 4], dtype=torch.int32),
        torch.arange(6, dtype=torch.int32).view(3, 2),
        8,
    )


def test_missing_tokens_have_no_position_and_no_slot() -> None:
    batch = _batch()
    assert batch.masked_positions is None
    kept = batch.keeping(torch.tensor([True, False, True, False]))
    assert kept.positions.tolist() == [4, -1, 1, -1]
    assert kept.slots.tolist() == [20, -1, 9, -1]
    assert kept.masked_positions is kept.positions
    assert kept.query_starts is batch.query_starts
    assert kept.page_tables is batch.page_tables
    assert (kept.tokens, kept.rows, kept.max_context) == (4, 3, 8)
    assert batch.positions.tolist() == [4, 0, 1, 7]


def test_what_is_kept_is_kept_of_those_that_are_there() -> None:
    kept = _batch().keeping(torch.tensor([True, False, True, True]))
    again = kept.keeping(torch.tensor([True, True, False, True]))
    assert again.positions.tolist() == [4, -1, -1, 7]


def test_a_copy_knows_that_tokens_are_missing() -> None:
    kept = _batch().keeping(torch.tensor([True, False, True, True]))
    copy = pickle.loads(pickle.dumps(kept))
    assert copy.masked
    assert copy.positions.tolist() == kept.positions.tolist()
    assert not pickle.loads(pickle.dumps(_batch())).masked
