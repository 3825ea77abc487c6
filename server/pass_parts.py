"""The tokens of a tick as one call through all blocks takes them, native or a device's graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from exeunt.kernels.model_pass import AtExit, PassRows, PassTokens
from exeunt.server.row import Row
from exeunt.server.row_sampling import PlainDraw
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import Part

_UNKNOWN: Final = 0  # of a token that only the device knows yet
_NO_DRAW: Final = PlainDraw(0.0, 0, 0)  # of a token whose logits are not wanted, or that is drawn elsewhere

_Draw = Callable[[Sequence, int], PlainDraw | None]


@dataclass(slots=True)
class PassParts:
    """The tokens of a tick's rows, those among them that wait behind an exit, and what they do on their way."""

    # of the token behind a position: None where its logits are changed first; no function where draws are not asked for
    draw: _Draw | None = None
    parts: list[Part] = field(default_factory=list)
    tokens: PassTokens = field(default_factory=PassTokens)
    rows: PassRows = field(default_factory=PassRows)
    draws: bool = field(init=False)  # whether all draws are from the logits as they are

    def __post_init__(self) -> None:
        self.draws = self.draw is not None

    @property
    def all_tokens(self) -> list[tuple[Row, int]]:
        """The row and position of each token."""
        return [(part.row, position) for part in self.parts for position in part.positions]

    @property
    def leaves_for_good(self) -> bool:
        """Whether a token may leave for good."""
        return AtExit.LEAVES in self.rows.at_exits

    def add(self, row: Row, asked: int) -> None:
        """Add a row whose newest token, if it has a threshold, asks the exits of these bits."""
        sequence, positions, to = row.sequence, row.positions, self.tokens
        table, threshold = sequence.table, row.threshold if row.positions else None
        entries = [0] * len(positions)
        if sequence.pending:  # the deeper it waits the older it is
            stages = sorted(sequence.pending, reverse=True)
            entries = [stage for stage in stages for _ in sequence.pending[stage]] + entries
            positions = [position for stage in stages for position in sequence.pending[stage]] + positions
        known, newest = sequence.tokens, positions[-1]
        for position, entry in zip(positions, entries, strict=True):
            needed = threshold if position == newest else None  # the confidence at which it leaves
            to.positions.append(position)
            to.slots.append(table.slot(position))
            to.ids.append(known[position] if position < len(known) else _UNKNOWN)
            to.entries.append(entry)
            to.asks.append(0 if needed is None else asked)
            to.thresholds.append(math.inf if needed is None else needed)
            self._add_draw(sequence, position)
        rows = self.rows
        rows.tokens.append(len(positions))
        rows.entries.append(row.stage)
        rows.at_exits.append(_at_exit(row))
        rows.pages.append(table.numbers[: newest // table.page_tokens + 1])
        self.parts.append(Part(row, positions))

    def _add_draw(self, sequence: Sequence, position: int) -> None:
        """Add whether a position's logits are wanted, and how its successor is drawn."""
        to, wanted = self.tokens, sequence.wants_logits(position)
        to.wants_logits.append(wanted)
        if self.draw is None:
            return
        found = self.draw(sequence, position) if wanted and self.draws else None
        if wanted:
            self.draws = found is not None
        temperature, *keys = found or _NO_DRAW
        to.temperatures.append(temperature)
        to.keys += keys


def _at_exit(row: Row) -> AtExit:
    if row.sequence.replays_exits:
        return AtExit.LEAVES
    return AtExit.STAYS if row.deep else AtExit.WAITS


def runs_whole(tick: Tick, plan: StagePlan) -> bool:
    """Whether a tick runs all stages, and no row of it scores a text or must leave again where it once did."""
    through = tick.first_stage == 0 and tick.last_stage == plan.last
    return through and all(map(_is_whole, tick.rows))


def _is_whole(row: Row) -> bool:
    sequence = row.sequence
    if sequence.scoring:
        return False
    return not row.positions or sequence.recorded_stage(row.positions[-1]) is None
