"""Which rows run next: admission, queues per variant and stage, fairness, preemption. Plain Python, no torch."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from exeunt.compression.variant import Variant
from exeunt.server.drafting import LOOKUP, Drafter, Proposal
from exeunt.server.pages import OutOfPagesError, PagePool
from exeunt.server.sequence import Sequence, Status
from exeunt.server.stage_choice import SchedulingPolicy, StageQueue, choose_stage
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan

MAX_OVERTAKEN: Final = 8  # a sequence that waits for pages is passed by so many smaller ones, and no more
LEAST_CHUNK: Final = 8  # tokens of a prompt that a tick takes in at least, whoever waits for it
_LOOKAHEAD: Final = 16  # how far down the queue a smaller one is looked for


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
        if self.deep:
            return len(self.positions) + sequence.owes
        return len(self.positions) + len(sequence.pending.get(self.stage, ()))

    @property
    def yields_token(self) -> bool:
        """Whether a token follows from the pass."""
        return not self.positions or self.sequence.yields_token(self.positions)

    @property
    def may_leave(self) -> bool:
        """Whether a token of this row may leave at an exit: a decode step, a text to score, or exits to replay."""
        sequence = self.sequence
        return self.threshold is not None or (sequence.replays_exits and bool(sequence.left_at))


@dataclass(frozen=True, slots=True)
class Tick:
    """A batch of rows of one variant that run stages up to `last_stage` together, each from its own stage on."""

    variant: Variant
    first_stage: int
    last_stage: int
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)


@dataclass(slots=True)
class _Lane:
    """The rows and sequences of one variant: who is ready to start a pass, and who waits at each deeper stage."""

    decoding: dict[Sequence, float] = field(default_factory=dict)  # since when, on the scheduler's clock
    prefilling: dict[Sequence, float] = field(default_factory=dict)
    deeper: list[dict[Sequence, Row]] = field(default_factory=list)  # [stage - 1]
    served_s: float = 0.0  # time this variant has had; the least served variant runs next
    running: int = 0  # sequences admitted and not ended

    def deepest(self) -> int | None:
        """The deepest stage at which a row waits, None when nothing does."""
        for stage in range(len(self.deeper), 0, -1):
            if self.deeper[stage - 1]:
                return stage
        return 0 if self.decoding or self.prefilling else None

    def queues(self) -> list[StageQueue]:
        """The stages in front of which rows wait; each holds its rows in the order in which they came."""
        found = []
        ready = len(self.decoding) + len(self.prefilling)
        if ready:
            oldest = min(next(iter(some.values())) for some in (self.decoding, self.prefilling) if some)
            found.append(StageQueue(0, ready, oldest))
        for stage, waiting in enumerate(self.deeper, start=1):
            if waiting:
                found.append(StageQueue(stage, len(waiting), next(iter(waiting.values())).since))
        return found

    def remove(self, sequence: Sequence) -> None:
        self.decoding.pop(sequence, None)
        self.prefilling.pop(sequence, None)
        for waiting in self.deeper:
            waiting.pop(sequence, None)


class Scheduler:
    """Decides what the next tick runs. One call costs O(running sequences) at worst, however many wait.

    Sequences wait first come, first served, except that while the first lacks pages a later one that fits may start:
    past each at most `MAX_OVERTAKEN`, then the free pages are saved up for it; past a preempted one, which has been
    served already and would lose its turn again, none. A running sequence holds pages for all it has computed. When
    pages run out the youngest gives its own back and is recomputed later. Between variants the one served the least
    time goes next.

    With the policy "run-through" a tick runs all stages, rows dropping out where they leave. With "queues" it ends at
    the first boundary at which one of its rows may leave, those that stay wait there, and `choose_stage` says which
    stage of the variant runs next, by `costs` and with nobody waiting longer than `longest_wait` seconds for a turn of
    its variant.

    A long prompt is computed in chunks beside the decode steps, each small enough, by `costs`, to make such a step
    about twice as long as it is alone.

    A token that left early and still owes its keys and values to deeper blocks waits in front of the next stage until
    a pass of its sequence comes by; when `max_owed` wait, or drafts can be taken no further, the next pass goes deep
    and takes them along.
    """

    def __init__(
        self,
        plan: StagePlan,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: SchedulingPolicy = "run-through",
        costs: StageCosts | None = None,
        longest_wait: float = 0.05,
        max_owed: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._pool = pool
        self._policy = policy
        self._costs = costs or StageCosts()
        self._longest_wait = longest_wait
        self._clock = clock
        self._max_owed = max_owed
        self._max_num_seqs = max_num_seqs
        self._budget = max(max_num_batched_tokens, 1)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, None] = {}  # in admission order, the youngest last
        self._lanes: dict[Variant, _Lane] = {}
        self._admissions = 0
        self._preempted: list[Sequence] = []
        self._newly_admitted: list[Sequence] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def running_sequences(self) -> Iterator[Sequence]:
        return iter(self._running)

    def rows_waiting(self) -> list[int]:
        """Rows that wait at each stage, over all variants."""
        counts = [0] * self._plan.stages
        for lane in self._lanes.values():
            counts[0] += len(lane.decoding) + len(lane.prefilling)
            for stage, waiting in enumerate(lane.deeper, start=1):
                counts[stage] += len(waiting)
        return counts

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind those that came before."""
        sequence.status = Status.WAITING
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, cancelled or failed sequence out and free its pages."""
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._leave_lane(sequence)
        sequence.status = Status.FINISHED
        sequence.table.clear()

    def take_preempted(self) -> list[Sequence]:
        """The sequences preempted since the last call."""
        taken, self._preempted = self._preempted, []
        return taken

    def take_admitted(self) -> list[Sequence]:
        """The sequences admitted since the last call."""
        taken, self._newly_admitted = self._newly_admitted, []
        return taken

    def admit(self) -> None:
        """Let waiting sequences start while there is room for their prompts."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return
        promised = sum(_missing(s) for s in self._running if s.prefilling)
        while self._waiting and len(self._running) < self._max_num_seqs:
            index = self._first_that_fits(promised)
            if index is None:
                break
            for passed in islice(self._waiting, index):
                passed.overtaken += 1
            promised += _missing(self._waiting[index])
            self._start(self._waiting[index], index)

    def _first_that_fits(self, promised: int) -> int | None:
        """Where in the queue the sequence stands that starts next; None when nobody may.

        `promised` are the pages that running sequences still need for their prompts.
        """
        if not self._running:
            return 0
        spare = len(self._running)  # each running sequence may want one more page soon
        free = self._pool.free - promised - spare
        for index, sequence in enumerate(islice(self._waiting, _LOOKAHEAD)):
            if _missing(sequence) <= free:
                return index
            if sequence.preemptions or sequence.overtaken >= MAX_OVERTAKEN:
                return None
        return None

    def _start(self, sequence: Sequence, index: int) -> None:
        del self._waiting[index]
        sequence.status = Status.RUNNING
        sequence.order = self._admissions = self._admissions + 1
        self._running[sequence] = None
        self._newly_admitted.append(sequence)
        self._enter_lane(sequence)
        self._start_pass(sequence)

    def next_tick(self) -> Tick | None:
        """The rows to run now, their pages allocated; None when nothing is ready."""
        self.admit()
        tick = self._form_tick()
        if tick is None and self._waiting and not self._running:  # what was ready has just been preempted
            self.admit()
            tick = self._form_tick()
        return tick

    def _form_tick(self) -> Tick | None:
        for variant in sorted(
            (v for v, lane in self._lanes.items() if lane.deepest() is not None), key=self._served
        ):
            lane = self._lanes[variant]
            if lane.deepest() is None:  # preempted meanwhile, for a variant tried before
                continue
            stage = self._next_stage(variant, lane)
            rows = self._take_deeper(lane, stage) if stage else self._take_ready(lane)
            if rows:
                return Tick(variant, stage, self._last_stage(stage, rows), tuple(rows))
        return None

    def _next_stage(self, variant: Variant, lane: _Lane) -> int:
        queues = lane.queues()
        if len(queues) == 1:
            return queues[0].stage
        everyone = sum(queue.rows for queue in queues)
        stages = self._costs.stages

        def cost(stage: int, rows: int) -> float:
            return stages[variant, stage].of(rows)

        return choose_stage(queues, everyone, cost, self._clock(), self._longest_wait)

    def served(self, variant: Variant, seconds: float) -> None:
        """Account the time a tick took, for fairness between variants."""
        self._lanes[variant].served_s += seconds

    def move_on(self, row: Row, stage: int) -> None:
        """Queue a row at a deeper stage, in front of which its tokens wait."""
        row.stage, row.positions, row.since = stage, [], self._clock()
        self._lanes[row.sequence.variant].deeper[stage - 1][row.sequence] = row

    def finish_pass(self, sequence: Sequence) -> None:
        """A running sequence has ended its pass: queue it for its next."""
        self._start_pass(sequence)

    def _served(self, variant: Variant) -> float:
        return self._lanes[variant].served_s

    def _lane(self, variant: Variant) -> _Lane:
        lane = self._lanes.get(variant)
        if lane is None:
            lane = self._lanes[variant] = _Lane(deeper=[{} for _ in range(self._plan.stages - 1)])
        return lane

    def _enter_lane(self, sequence: Sequence) -> None:
        lane = self._lane(sequence.variant)
        if not lane.running:  # idle until now: what it did not use then is no credit
            busy = [other.served_s for other in self._lanes.values() if other.running]
            lane.served_s = max([lane.served_s, *([min(busy)] if busy else [])])
        lane.running += 1

    def _start_pass(self, sequence: Sequence) -> None:
        lane = self._lanes[sequence.variant]
        (lane.prefilling if sequence.prefilling else lane.decoding)[sequence] = self._clock()

    def _take_deeper(self, lane: _Lane, stage: int) -> list[Row]:
        rows: list[Row] = []
        budget = self._budget
        waiting = lane.deeper[stage - 1]
        while waiting:
            sequence, row = next(iter(waiting.items()))
            if rows and row.tokens > budget:
                break
            budget -= row.tokens
            rows.append(waiting.pop(sequence))
        return rows

    def _take_ready(self, lane: _Lane) -> list[Row]:
        """Decode steps first, then chunks of prompts with what the token budget leaves (never nothing)."""
        rows: list[Row] = []
        taken: set[Sequence] = set()
        for ready in (lane.decoding, lane.prefilling):
            left = self._budget if ready is lane.decoding else self._prompt_room(rows)
            for sequence in list(ready):
                if left <= 0:
                    break
                if sequence not in ready:  # preempted while this tick was put together
                    continue
                row = self._next_row(sequence, left)
                if rows and row.tokens > left:  # it takes others along; in the next tick it comes first
                    break
                if not self._make_room(sequence, row.stop, taken):
                    continue
                del ready[sequence]
                taken.add(sequence)
                left -= row.tokens
                rows.append(row)
        return rows

    def _prompt_room(self, rows: list[Row]) -> int:
        """Tokens of prompts that may share a tick with these decode steps: about as many as take as long as they do."""
        tokens = sum(row.tokens for row in rows)
        room = max(self._budget - tokens, 1)
        if not rows:
            return room
        variant = rows[0].sequence.variant
        stages = [self._costs.stages[variant, stage] for stage in range(self._plan.stages)]
        if any(cost.each is None or not cost.weight for cost in stages):
            return room
        step = sum(cost.of(tokens) for cost in stages)
        each = max(sum(cost.each or 0.0 for cost in stages), 1e-9)
        return min(room, max(int(step / each), LEAST_CHUNK))

    def _next_row(self, sequence: Sequence, most: int) -> Row:
        """The next pass of a sequence: up to `most` tokens of its prefill, or a decode step."""
        if sequence.prefilling or sequence.scoring:
            positions = list(sequence.next_positions(most))
            threshold = sequence.exits.threshold if sequence.scoring else None
            return Row(sequence, positions, positions[-1] + 1, threshold=threshold)
        if sequence.drafter is not None:
            return self._drafting_row(sequence, sequence.drafter, most)
        positions = list(sequence.next_positions(1))
        deep = sequence.owes >= self._max_owed
        threshold = sequence.exits.threshold if positions[0] >= sequence.prompt_tokens else None
        return Row(sequence, positions, positions[-1] + 1, deep=deep, threshold=threshold)

    def _drafting_row(self, sequence: Sequence, drafter: Drafter, most: int) -> Row:
        """The next step of a sequence whose exits are drafts; drafts that were looked up are taken in.

        These are guesses: they get what is left of the tick's `most` tokens and of the free pages, and displace nobody.
        So a row with guesses always finds room, and the tick that asked for it runs it.
        """
        room, owes = sequence.room, sequence.owes
        if room <= 0:  # nothing more can follow: what waits is to be confirmed
            return Row(sequence, [], sequence.computed, stage=min(sequence.pending), deep=True)
        proposal = _GO_DEEP
        if room > 1 and owes < self._max_owed and len(sequence.tokens) > sequence.prompt_tokens:
            proposal = drafter.propose(sequence.tokens, len(sequence.drafts), room - 1)
            if proposal.tokens:
                proposal = Proposal(proposal.tokens[: max(most - owes - 1, 0)])
            if sequence.table.missing(len(sequence.tokens) + len(proposal.tokens)) > self._pool.free:
                proposal = Proposal(threshold=proposal.threshold)
        start = len(sequence.tokens) - 1
        sequence.tokens += proposal.tokens
        sequence.drafts += [LOOKUP] * len(proposal.tokens)
        positions = list(range(start, len(sequence.tokens)))
        threshold = None if proposal.tokens else proposal.threshold
        return Row(sequence, positions, positions[-1] + 1, deep=threshold is None, threshold=threshold)

    def _make_room(self, sequence: Sequence, tokens: int, taken: set[Sequence]) -> bool:
        """Get pages for a sequence's first `tokens` positions, preempting younger ones; False if it must wait."""
        while True:
            try:
                sequence.table.ensure(tokens)
            except OutOfPagesError:
                victim = next((s for s in reversed(self._running) if s not in taken and s.table.pages), None)
                if victim is sequence and any(s.order > sequence.order for s in taken):
                    return False  # its juniors are in this tick already; in the next it comes before them
                if victim is None or victim.order < sequence.order:
                    if not taken and len(self._running) > 1:
                        self._preempt(sequence)  # all pages are with its elders: it steps back
                    return False
                self._preempt(victim)
                if victim is sequence:
                    return False
            else:
                return True

    def _leave_lane(self, sequence: Sequence) -> None:
        self._running.pop(sequence)
        lane = self._lanes[sequence.variant]
        lane.remove(sequence)
        lane.running -= 1

    def _preempt(self, sequence: Sequence) -> None:
        self._leave_lane(sequence)
        sequence.drop_computed()
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)
        self._preempted.append(sequence)

    def _last_stage(self, stage: int, rows: list[Row]) -> int:
        if any(row.stage > stage for row in rows):
            return self._plan.last  # a row that only confirms begins deeper: the tick goes on to where it is
        if self._policy == "queues" and any(row.may_leave for row in rows):
            return stage
        return self._plan.last


_GO_DEEP: Final = Proposal()


def _missing(sequence: Sequence) -> int:
    """Pages that a sequence still needs to compute its prompt and its first token."""
    return sequence.table.missing(sequence.prefill_target + 1)
