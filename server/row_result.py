"""What became of a row in one tick. Plain data, no torch."""

from dataclasses import dataclass, field

from exeunt.server.audit import Audit
from exeunt.server.row import Row
from exeunt.server.verification import Draw


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a given text's token at `position` + 1, and the stage at which the pass left."""

    position: int
    logprob: float
    stage: int


@dataclass(slots=True)
class RowResult:
    """What became of one row. `waits_at` is the stage it goes on with, None when the pass is over.

    `draws` are in the order of their positions. `pairs` counts the block × token pairs that were run for positions
    whose pass yields a token, `passes` the blocks that the row took part in for them.
    """

    row: Row
    waits_at: int | None = None
    draws: tuple[Draw, ...] = ()
    scores: list[Score] = field(default_factory=list)
    pairs: int = 0
    passes: int = 0
    audits: list[Audit] = field(default_factory=list)
    blocks_beside: int = (
        0  # run for one token and not for the answer: audits, a step that could not be begun ahead
    )

    def count(self, positions: list[int], blocks: int, *, joined: bool = False) -> None:
        """Count `blocks` blocks run over these positions; those of a prompt but its last count nowhere.

        Of positions that `joined` others of the row on their way the row's part in the passes is counted with those.
        """
        sequence = self.row.sequence
        if sequence.scoring or positions[-1] < sequence.prompt_tokens - 1:
            return
        first = sequence.prompt_tokens - 1
        counted = len(positions) if positions[0] >= first else sum(p >= first for p in positions)
        self.pairs += counted * blocks
        if not joined:
            self.passes += blocks
