"""One sequence on its way through the engine: its tokens, its pages, and what has passed which stage. No torch."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from exeunt.compression.variant import Variant
from exeunt.server.drafting import Drafter
from exeunt.server.pages import PageTable
from exeunt.server.request import DepthTotals, ExitPolicy


class Status(Enum):
    """Where a sequence stands with the scheduler."""

    WAITING = "waiting"  # queued, or preempted: holds no pages
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated from it (one choice of a request), or a text to be scored.

    The pass over position p yields the token at p + 1. `tokens` ends in `drafts`, tokens that were proposed and not
    confirmed yet; nobody has been told of them. `left_at` records, for every pass that yielded a token, the stage at
    whose end the token left, so that recomputing after a preemption replays the same exits where their keys and values
    were propagated.
    """

    name: str
    variant: Variant
    exits: ExitPolicy
    tokens: list[int]
    prompt_tokens: int
    table: PageTable
    scoring: bool = False
    limit: int = 1 << 62  # tokens it may grow to
    ends: frozenset[int] = frozenset()  # token ids that end it
    drafter: Drafter | None = None  # says when to draft; None where tokens are not drafted
    foreseeable: bool = False  # but for drafts, no more of a token than its id matters to the next pass
    status: Status = Status.WAITING
    computed: int = 0  # positions 0..computed - 1 have passed the first stage
    left_at: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # the stage that proposed each, LOOKUP: none did
    pending: dict[int, list[int]] = field(default_factory=dict)  # positions in front of a stage, ascending
    order: int = 0  # admission order: the youngest is preempted first
    preemptions: int = 0
    overtaken: int = 0  # later ones that started while it waited for pages
    totals: DepthTotals = field(default_factory=DepthTotals)

    @property
    def confirmed(self) -> int:
        """Tokens that will not be taken back: all but the drafts."""
        return len(self.tokens) - len(self.drafts)

    @property
    def generated(self) -> int:
        """Confirmed tokens behind the prompt."""
        return self.confirmed - self.prompt_tokens

    @property
    def replays_exits(self) -> bool:
        """Whether recomputing must leave where the first pass left: propagated keys and values depend on it."""
        return self.exits.mode == "approximate" and self.exits.skipped_kv == "propagate"

    @property
    def room(self) -> int:
        """Tokens that may still follow, were all drafts right: none after one that ends it."""
        if self.drafts and not self.ends.isdisjoint(self.tokens[self.confirmed :]):
            return 0
        return self.limit - len(self.tokens)

    @property
    def owes(self) -> int:
        """Positions that have not passed all stages yet."""
        return sum(map(len, self.pending.values())) if self.pending else 0

    @property
    def prefill_target(self) -> int:
        """Positions to compute before it decodes: its prompt, or after a preemption all but its last token."""
        if self.scoring or self.left_at:
            return self.confirmed - 1
        return self.prompt_tokens

    @property
    def prefilling(self) -> bool:
        """Whether some of what is to be computed before it decodes is not."""
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
        """The stage at which the pass over `position` must leave again, None where it has not been run."""
        if self.scoring or not self.replays_exits:
            return None
        passed = position - (self.prompt_tokens - 1)
        return self.left_at[passed] if 0 <= passed < len(self.left_at) else None

    def wants_logits(self, position: int) -> bool:
        """Whether the model's own head is to be asked about `position`: its next token is not certain yet."""
        return self.scoring or position >= self.confirmed - 1

    def put_back(self, stage: int, positions: Items[int]) -> None:
        """Note that `positions` wait in front of `stage` (their states are in `HeldStates`)."""
        self.pending.setdefault(stage, []).extend(positions)

    def reject_drafts(self, kept: int) -> None:
        """Drop all drafts but the first `kept`, with what was computed of them and after them."""
        dropped = len(self.drafts) - kept
        if dropped:
            del self.tokens[-dropped:]
            del self.drafts[kept:]
        self.computed = min(self.computed, len(self.tokens) - 1)

    def drop_computed(self) -> None:
        """Give back all pages; everything is to be computed again, and drafts are forgotten."""
        self.reject_drafts(0)
        self.pending.clear()
        self.table.clear()
        self.computed = 0
