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
        """Whether it is a decode step of every row, behind which the next could be begun ahead: none drafts."""
        return all(_is_plain(row) for row in self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, those that wait in front of the stages included."""
        return sum(row.tokens for row in self.rows)


def _is_plain(row: Row) -> bool:
    sequence = row.sequence
    asks_to_draft = row.threshold is not None and sequence.drafter is not None
    unsettled = asks_to_draft or sequence.drafts or sequence.pending or sequence.prefilling
    return sequence.foreseeable and len(row.positions) == 1 and not unsettled
