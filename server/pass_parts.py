"""The tokens of a tick as one native call through all blocks takes them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from exeunt.kernels.decode_pass import AtExit, PassRows, PassTokens
from exeunt.server.row import Row
from exeunt.server.sequence import Sequence
from exeunt.server.tick_batch import Part

Draw = tuple[float, int, int]
"""A temperature and the two keys of the noise."""


@dataclass(slots=True)
class PassParts:
    """The tokens of a tick's rows, those among them that wait behind an exit, and what they do on their way."""

    draw: Callable[
        [Sequence, int], Draw | None
    ]  # of the token behind a position; None where logits are changed first
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
        to.ids += [sequence.tokens[position] for position in positions]
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
        """Add of whose logits the head is asked, the last of these positions, and what is drawn from them."""
        to, heard = self.tokens, [position for position in positions if sequence.wants_logits(position)]
        silent = len(positions) - len(heard)
        to.wanted += [*([False] * silent), *([True] * len(heard))]
        to.temperatures += [0.0] * silent
        to.keys += [0, 0] * silent
        for position in heard:
            found = self.draw(sequence, position) if self.draws else None
            self.draws = found is not None
            temperature, first, second = found or (0.0, 0, 0)
            to.temperatures.append(temperature)
            to.keys += (first, second)


def _at_exit(row: Row) -> AtExit:
    if row.sequence.replays_exits:
        return AtExit.LEAVES
    return AtExit.STAYS if row.deep else AtExit.WAITS
