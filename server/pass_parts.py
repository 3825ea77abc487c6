"""The tokens of a tick as one native call through all blocks takes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from exeunt.kernels.model_pass import AtExit, PassRows, PassTokens
from exeunt.server.row import Row
from exeunt.server.sampling import PlainDraw
from exeunt.server.sequence import Sequence
from exeunt.server.tick_batch import Part

_UNKNOWN: Final = 0  # of a token that only the device knows yet


@dataclass(slots=True)
class PassParts:
    """The tokens of a tick's rows, those among them that wait behind an exit, and what they do on their way.

    Where `draws` is false from the start nothing is asked about draws.
    """

    # of the token behind a position; None where its logits are changed first
    draw: Callable[[Sequence, int], PlainDraw | None]
    parts: list[Part] = field(default_factory=list)
    tokens: PassTokens = field(default_factory=PassTokens)
    rows: PassRows = field(default_factory=PassRows)
    draws: bool = True  # whether all draws are from the logits as they are

    def add(self, row: Row, asked: int) -> None:
        """Add a row whose newest token, if it has a threshold, asks the exits of these bits."""
        sequence, positions, to = row.sequence, row.positions, self.tokens
        table, threshold = sequence.table, row.threshold if row.positions else None
        entries = [0] * len(positions)
        if sequence.pending:  # the deeper it waits the older it is
            stages = sorted(sequence.pending, reverse=True)
            entries = [stage for stage in stages for _ in sequence.pending[stage]] + entries
            positions = [position for stage in stages for position in sequence.pending[stage]] + positions
        older = len(positions) - 1
        to.positions += positions
        to.slots += [table.slot(position) for position in positions]
        known = sequence.tokens
        to.ids += [known[position] if position < len(known) else _UNKNOWN for position in positions]
        to.entries += entries
        to.asks += [*([0] * older), 0 if threshold is None else asked]
        to.thresholds += [*([math.inf] * older), math.inf if threshold is None else threshold]
        self._add_draws(sequence, positions)
        self.rows.tokens.append(len(positions))
        self.rows.entries.append(row.stage)
        self.rows.at_exits.append(_at_exit(row))
        self.rows.pages.append(table.numbers[: positions[-1] // table.page_tokens + 1])
        self.parts.append(Part(row, positions))

    def _add_draws(self, sequence: Sequence, positions: list[int]) -> None:
        """Add whose logits are wanted, those of the last of these positions, and how their successors are drawn."""
        to, wanted = self.tokens, [position for position in positions if sequence.wants_logits(position)]
        others = len(positions) - len(wanted)
        to.wants_logits += [*([False] * others), *([True] * len(wanted))]
        to.temperatures += [0.0] * others
        to.keys += [0, 0] * others
        for position in wanted:
            found = self.draw(sequence, position) if self.draws else None
            self.draws = found is not None
            to.temperatures.append(0.0 if found is None else found.temperature)
            to.keys += (0, 0) if found is None else (found.first_key, found.second_key)


def _at_exit(row: Row) -> AtExit:
    if row.sequence.replays_exits:
        return AtExit.LEAVES
    return AtExit.STAYS if row.deep else AtExit.WAITS
