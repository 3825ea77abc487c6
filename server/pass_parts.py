"""The tokens of a tick as one call through all blocks takes them, native or a device's graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from exeunt.kernels.model_pass import AtExit, PassRows, PassTokens
from exeunt.server.row import Row
from exeunt.server.sampling import PlainDraw
from exeunt.server.sequence import Sequence
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_batch import Part

_UNKNOWN: Final = 0  # of a token that only the device knows yet


@dataclass(slots=True)
class PassParts:
    """The tokens of a tick's rows, those among them that wait behind an exit, and what they do on their way."""

    # of the token behind a position: None where its logits are changed first; no function where draws are not asked for
    draw: Callable[[Sequence, int], PlainDraw | None] | None = None
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
        if self.draw is None:
            return
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


def runs_whole(tick: Tick, plan: StagePlan) -> bool:
    """Whether a tick runs all stages, and no row of it scores a text or must leave again where it once did."""
    through = tick.first_stage == 0 and tick.last_stage == plan.last
    return through and all(map(_is_whole, tick.rows))


def _is_whole(row: Row) -> bool:
    sequence = row.sequence
    if sequence.scoring:
        return False
    return not row.positions or sequence.recorded_stage(row.positions[-1]) is None
