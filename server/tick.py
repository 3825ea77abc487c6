"""What the engine runs at once: a batch of rows. Plain data, no torch."""

from typing import NamedTuple

from exeunt.compression.variant import Variant
from exeunt.server.row import Row


class Tick(NamedTuple):
    """A batch of rows of one variant that run stages up to `last_stage` together, each from its own stage on."""

    variant: Variant
    first_stage: int
    last_stage: int
    rows: tuple[Row, ...]

    @property
    def plain(self) -> bool:
        """Whether it is a decode step of every row that asks no exit and neither drafts nor confirms drafts."""
        return all(_is_plain(row) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, those that wait in front of the stages included."""
        return sum(row.tokens for row in self.rows)


def _is_plain(row: Row) -> bool:
    sequence = row.sequence
    unsettled = sequence.prefilling or sequence.scoring or sequence.drafts or sequence.pending
    return len(row.positions) == 1 and row.threshold is None and not unsettled
