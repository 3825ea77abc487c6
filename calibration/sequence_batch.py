"""Rows of tokens packed into one batch over pages: the geometry of teacher-forced passes.

Row r of a batch owns pages r × pages_per_row and on, so a batch needs no allocator and every batch of the same shape
reuses the same arena. Tokens that left the model early are left out by `SequenceBatch.geometry`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exeunt.kernels.paged_batch import PagedBatch


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Rows of tokens, one after another. T tokens, R rows; row numbers count from 0 within the batch."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each row
    rows: Tensor  # [T] int64, ascending
    targets: Tensor  # [T] int64, the token that follows in the row, -1 at a row's last token
    first_row: int  # number of the batch's first row in the whole split

    @property
    def tokens(self) -> int:
        """T, the tokens of all rows."""
        return int(self.token_ids.shape[0])

    @property
    def row_count(self) -> int:
        """R, the rows."""
        return int(self.rows[-1]) + 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.positions.max()) + 1

    def pages(self, page_tokens: int) -> int:
        """Pages that the batch's rows take, at `page_tokens` tokens to a page."""
        return self.row_count * -(-self.longest // page_tokens)

    def geometry(self, page_tokens: int, kept: Tensor | None = None) -> PagedBatch:
        """The batch's geometry, of the tokens numbered in `kept` [K] int64 (ascending) where given.

        Rows without a token left are dropped from it.
        """
        per_row = -(-self.longest // page_tokens)
        rows = self.rows if kept is None else self.rows[kept]
        positions = self.positions if kept is None else self.positions[kept]
        present, counts = torch.unique_consecutive(rows, return_counts=True)
        starts = torch.zeros(len(present) + 1, dtype=torch.int32, device=rows.device)
        starts[1:] = counts.cumsum(0)
        first_page = present * per_row
        tables = first_page[:, None] + torch.arange(per_row, device=rows.device)
        return PagedBatch(
            positions=positions,
            slots=rows * per_row * page_tokens + positions,
            query_starts=starts,
            page_tables=tables.to(torch.int32),
            max_context=int(positions.max()) + 1,
        )


def batches(
    rows: Sequence[Tensor], tokens: int, device: torch.device | str = "cpu"
) -> Iterator[SequenceBatch]:
    """`rows` (each [n] int64) in order, packed into batches of at most `tokens` tokens, at least one row each."""
    group: list[Tensor] = []
    held = first = 0
    for row in rows:
        if group and held + len(row) > tokens:
            yield _pack(group, first, device)
            first += len(group)
            group, held = [], 0
        group.append(row)
        held += len(row)
    if group:
        yield _pack(group, first, device)


def first_rows(rows: Sequence[Tensor], tokens: int) -> tuple[Tensor, ...]:
    """The first of `rows`, up to `tokens` tokens, at least one. Rows of a split come from its documents in turn."""
    kept: list[Tensor] = []
    held = 0
    for row in rows:
        if kept and held + len(row) > tokens:
            break
        kept.append(row)
        held += len(row)
    return tuple(kept)


def _pack(rows: list[Tensor], first_row: int, device: torch.device | str) -> SequenceBatch:
    lengths = torch.tensor([len(row) for row in rows])
    ends = lengths.cumsum(0)
    token_ids = torch.cat(rows)
    numbers = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    positions = torch.arange(len(token_ids)) - (ends - lengths)[numbers]
    targets = token_ids.roll(-1)
    targets[ends - 1] = -1
    return SequenceBatch(
        token_ids.to(device), positions.to(device), numbers.to(device), targets.to(device), first_row
    )
