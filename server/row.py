"""One pass of one sequence on its way through the stages. Plain data, no torch."""

from dataclasses import dataclass, field

from exeunt.server.sequence import Sequence


@dataclass(slots=True, eq=False)
class Row:
    """One pass of one sequence: its next token(s), with what of it waits in front of the stages on the way.

    `positions` begin at stage 0; a row that begins deeper has none and takes up what waits there. A `deep` row goes to
    the model's end and takes everything along; at exits it passes its token may still be emitted.
    """

    sequence: Sequence
    positions: list[int]
    stop: int  # one past the last position of the pass
    stage: int = 0
    deep: bool = False
    threshold: float | None = None  # the confidence at which its token leaves; None: it asks no gate
    since: float = 0.0  # when it came to its stage, on the scheduler's clock
    left: set[int] = field(default_factory=set)  # positions whose logits came from an exit

    @property
    def tokens(self) -> int:
        """Tokens that the row brings to its stage, or, if it is deep, to the deepest."""
        sequence = self.sequence
        if not sequence.pending:
            return len(self.positions)
        waiting = sequence.owes if self.deep else len(sequence.pending.get(self.stage, ()))
        return len(self.positions) + waiting

    @property
    def may_leave(self) -> bool:
        """Whether a token of this row may leave at an exit: a decode step, a text to score, or exits to replay."""
        sequence = self.sequence
        return self.threshold is not None or (sequence.replays_exits and bool(sequence.left_at))
