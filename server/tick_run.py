"""A tick while it runs: what of it is under way, and what it has yielded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, Protocol

from torch import Tensor

from exeunt.compression.variant import Variant
from exeunt.server.row import Row
from exeunt.server.row_result import RowResult
from exeunt.server.sampling import StartedDraws
from exeunt.server.tick import Tick
from exeunt.server.verification import Draw


class StageRun(NamedTuple):
    """Stages run in one piece: from where rows entered to the next gate or the tick's end.

    `seconds` hold the tick's set-up with the first and its draws with the last, and what was told meanwhile as far as
    it took longer than a GPU; of a tick in one native call what that took, and no more. They hold neither audits nor
    the capturing of CUDA graphs, and `gate_seconds` of them were spent asking the gate about `gated` tokens. Those of a
    tick that was begun before the one in front of it had ended are counted from that end, audits of that one left out.
    A device's pass, in which tokens leave on the way, is told as one run for each stage that had tokens, by its share
    of blocks; `gated` is 0 though gates were asked.
    """

    variant: Variant
    stages: range
    seconds: float
    rows: int  # that entered
    tokens: int
    gated: int
    gate_seconds: float


class StageShare(NamedTuple):
    """A stage inside a device's pass: the rows and tokens that were in it, and its share of the time."""

    stage: int
    rows: int
    tokens: int
    share: float


@dataclass(slots=True)
class Piece:
    """Stages under way, run in one piece by so many rows and tokens."""

    stages: range
    rows: int
    tokens: int
    gated: int = 0  # tokens that the gate behind them was asked about
    gate_seconds: float = 0.0
    by_stage: list[StageShare] = field(default_factory=list)  # of a device's pass, once its exits are noted

    def ended(self, variant: Variant, seconds: float) -> list[StageRun]:
        """They have run, for so long."""
        if self.by_stage:
            return [
                StageRun(
                    variant,
                    range(each.stage, each.stage + 1),
                    seconds * each.share,
                    each.rows,
                    each.tokens,
                    0,
                    0.0,
                )
                for each in self.by_stage
            ]
        of_gate = self.gated, self.gate_seconds
        return [StageRun(variant, self.stages, seconds, self.rows, self.tokens, *of_gate)]


class Undrawn(NamedTuple):
    """Logits [tokens, vocab] of tokens whose successors are to be drawn: of each its row, position and stage.

    A stage of None is that of a token that stopped on its way: what is drawn for it is nobody's.
    """

    tokens: Sequence[tuple[Row, int, int | None]]
    logits: Tensor


class PendingExits(Protocol):
    """What is to be heard from the device of who left where."""

    @property
    def left_at(self) -> Tensor:
        """[draws] int64, on the device: it comes to the host with what is drawn."""
        ...

    def note_exits(self, run: "TickRun", left_at: Sequence[int]) -> None:
        """Note it with the run, now that it is on the host."""
        ...


class TickRun:
    """A tick under way: its rows by the stage they enter at, and what they have yielded."""

    def __init__(self, tick: Tick, began: float) -> None:
        """`began` is when its first piece did, on the runner's clock."""
        self.tick = tick
        self.began = began  # when what `piece` says began
        self.piece: Piece | None = None
        self.entering: dict[int, list[Row]] = {}
        for row in tick.rows:
            self.entering.setdefault(row.stage, []).append(row)
        self.results = {row: RowResult(row) for row in tick.rows}
        self.undrawn: list[Undrawn] = []
        self.draws: StartedDraws | None = None  # of the tokens of `undrawn`, one after the other
        self.pending_exits: PendingExits | None = None  # where the device decided, and knows it alone

    @property
    def drawn_rows(self) -> list[Row]:
        """The row of each draw, in the order of `draws`."""
        return [row for some in self.undrawn for row, _, _ in some.tokens]

    def note_gate(self, gated: int, seconds: float) -> None:
        """The gate behind the stages that run was asked about so many tokens, for so long."""
        if self.piece is not None:
            self.piece.gated, self.piece.gate_seconds = gated, seconds

    def ended_piece(self, ended: float, besides: float) -> list[StageRun]:
        """The piece under way, ended now, with so many seconds spent `besides`; what follows begins.

        Raises RuntimeError where none is under way.
        """
        piece, began = self.piece, self.began
        if piece is None:
            raise RuntimeError("no stages are under way")
        self.piece, self.began = None, ended
        return piece.ended(self.tick.variant, ended - began - besides)

    def take_draws(self) -> None:
        """Wait for the draws and note them with their rows' results, and before that who left where."""
        if self.draws is None:
            return
        drawn = self.draws.wait()
        pending, self.pending_exits = self.pending_exits, None
        if pending is not None:
            pending.note_exits(self, drawn.beside)
        found: dict[Row, list[Draw]] = {}
        places = [token for some in self.undrawn for token in some.tokens]
        for (row, position, stage), token, logprob, error in zip(
            places, drawn.ids, drawn.logprobs, drawn.errors, strict=True
        ):
            if stage is not None:
                found.setdefault(row, []).append(Draw(token, logprob, stage, position, error))
        for row, draws in found.items():
            if len(draws) > 1:
                draws.sort(key=attrgetter("position"))
            self.results[row].draws = tuple(draws)


Successor = Callable[[Tick], Tick | None]
"""The tick that follows one that runs, where that is known before its tokens are; None where it is not."""
