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
    def tokens(self) -> int:
        """Tokens of all rows, those that wait in front of the stages included."""
        return sum(row.tokens for row in self.rows)
