"""One sequence on its way through the engine: its tokens, its pages and how far its keys and values reach."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from exeunt.compression.variant import Variant
from exeunt.server.pages import PageTable
from exeunt.server.request import DepthTotals, ExitPolicy


class Status(Enum):
    WAITING = "waiting"  # queued, or preempted: holds no pages
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated from it (one choice of a request), or a text to be scored.

    The pass over position p yields the token at p + 1. `left_at` records, for every pass that yielded a token, the
    stage at whose end the token left, so that recomputing after a preemption replays the same exits.
    """

    name: str
    variant: Variant
    exits: ExitPolicy
    tokens: list[int]
    prompt_tokens: int
    table: PageTable
    scoring: bool = False
    status: Status = Status.WAITING
    computed: int = 0  # positions 0..computed - 1 have their keys and values in every block
    left_at: list[int] = field(default_factory=list)
    order: int = 0  # admission order: the youngest is preempted first
    preemptions: int = 0
    overtaken: int = 0  # later ones that started while it waited for pages
    totals: DepthTotals = field(default_factory=DepthTotals)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def may_leave(self) -> bool:
        return self.exits.mode == "approximate"

    @property
    def prefill_target(self) -> int:
        """Positions to compute before it decodes: its prompt, or after a preemption all but its last token."""
        if self.scoring or self.left_at:
            return len(self.tokens) - 1
        return self.prompt_tokens

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prefill_target

    def next_positions(self, most: int) -> range:
        """The positions of the next pass: up to `most` of the prefill, or the one of a decode step."""
        if self.prefilling:
            return range(self.computed, min(self.prefill_target, self.computed + most))
        return range(len(self.tokens) - 1, len(self.tokens))

    def yields_token(self, positions: Items[int]) -> bool:
        """Whether the pass over these positions ends in a new token."""
        return not self.scoring and positions[-1] == len(self.tokens) - 1

    def recorded_stage(self, position: int) -> int | None:
        """The stage at which the pass over `position` left before, None where it has not been run."""
        if self.scoring:
            return None
        passed = position - (self.prompt_tokens - 1)
        return self.left_at[passed] if 0 <= passed < len(self.left_at) else None

    def asks_gate(self, position: int) -> bool:
        """Whether the token at `position` may leave at an exit: never a prompt's, nor one whose exit is on record."""
        free = self.scoring or position >= self.prompt_tokens
        return self.may_leave and free and self.recorded_stage(position) is None

    def drop_computed(self) -> None:
        """Give back all pages; everything is to be computed again."""
        self.table.clear()
        self.computed = 0
