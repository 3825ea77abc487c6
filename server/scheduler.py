"""Which rows run next: admission, queues per variant and stage, fairness, preemption. Plain Python, no torch."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from exeunt.compression.variant import Variant
from exeunt.server.engine_config import MAX_OWED
from exeunt.server.lane import Lane
from exeunt.server.pages import OutOfPagesError, PagePool
from exeunt.server.row import Row
from exeunt.server.row_choice import next_row
from exeunt.server.sequence import Sequence, Status
from exeunt.server.stage_choice import SchedulingPolicy, choose_stage
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick

MAX_OVERTAKEN: Final = 8  # a sequence that waits for pages is passed by so many smaller ones, and no more
LEAST_CHUNK: Final = 3  # tokens of a prompt that a tick takes in at least, whoever waits for it
_CHUNK_SHARE: Final = (
    0.6  # of a decode step's time; its long context, its last token's head and its Python come on top
)
_LOOKAHEAD: Final = 16  # how far down the queue a smaller one is looked for


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
    at most about twice as long as it is alone; longer where more prompts wait than sequences decode.

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
        max_owed: int = MAX_OWED,
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
        self._lanes: dict[Variant, Lane] = {}
        self._admissions = 0
        self._preempted: list[Sequence] = []
        self._newly_admitted: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """Sequences that queue, those preempted among them."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have been admitted and hold, or may hold, pages."""
        return len(self._running)

    def running_sequences(self) -> Iterator[Sequence]:
        """The running sequences in the order of their admission."""
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
            if sequence in self._waiting:  # it may have failed before it was queued
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
        promised: int | None = None
        while self._has_room():
            if promised is None:
                promised = self._promised()
            index = self._first_that_fits(promised)
            if index is None:
                break
            for passed in islice(self._waiting, index):
                passed.overtaken += 1
            promised += _missing(self._waiting[index])
            self._start(self._waiting[index], index)

    def _has_room(self) -> bool:
        """Whether somebody waits and one more sequence may run, if it finds pages."""
        return bool(self._waiting) and len(self._running) < self._max_num_seqs

    def _promised(self) -> int:
        """Pages that running sequences still need for their prompts."""
        return sum(_missing(s) for s in self._running if s.prefilling)

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

    def next_tick(self, *, ahead: bool = False) -> Tick | None:
        """The rows to run now, their pages allocated; None when nothing is ready.

        Where the one behind it may be begun `ahead`, and that gains more than drafts, nothing is drafted.
        """
        self.admit()
        tick = self._form_tick(ahead)
        if tick is None and self._waiting and not self._running:  # what was ready has just been preempted
            self.admit()
            tick = self._form_tick(ahead)
        return tick

    def tick_ahead(self, tick: Tick) -> Tick | None:
        """The tick behind `tick`, which runs: the next step of all its sequences but those that end by their length.

        None where it must be known first which tokens the tick yields, or where another sequence has a turn before; and
        where the drafts that it goes without are expected to save more than a head start gains.
        Pages are allocated, and nobody is preempted for them. Whoever takes it calls `resume` when its turn has come.
        """
        if any(lane.deepest() is not None for lane in self._lanes.values()):
            return None
        if self._has_room() and self._first_that_fits(self._promised()) is not None:
            return None
        going = [row for row in tick.rows if row.sequence.status is Status.RUNNING]
        if not all(_foreseeable(row) for row in going):
            return None
        # a token's place is behind those that are known
        steps = {row.sequence: len(row.sequence.tokens) for row in going if row.sequence.room > 1}
        if not steps or sum(s.table.missing(place + 1) for s, place in steps.items()) > self._pool.free:
            return None
        if self._drafts_pay(tick.variant, list(steps)):
            return None
        for sequence, place in steps.items():
            sequence.table.ensure(place + 1)
        rows = tuple(
            Row(
                sequence,
                [place],
                place + 1,
                deep=sequence.drafter is not None,
                threshold=sequence.exits.threshold,
            )
            for sequence, place in steps.items()
        )
        return Tick(tick.variant, 0, self._plan.last, rows)

    def resume(self, tick: Tick) -> None:
        """A tick of `tick_ahead` has its turn: its sequences, those that still run, are ready for no other."""
        for row in tick.rows:
            self._lane(tick.variant).decoding.pop(row.sequence, None)

    def _drafts_pay(self, variant: Variant, sequences: list[Sequence]) -> bool:
        """Whether drafts are expected to save these sequences' step more than a head start does.

        That is weighed for all together: one that drafts keeps the others' step waiting.
        """
        at_stake, rows = 0.0, len(sequences)
        for sequence in sequences:
            if sequence.drafter is not None:
                at_stake += sequence.drafter.at_stake(sequence.tokens, len(sequence.drafts), rows)
        return at_stake > 0.0 and at_stake >= self._costs.head_start(variant, rows)

    def _rests(self, variant: Variant, lane: Lane) -> bool:
        """Whether the next step of a variant had better draft nothing, so that the one behind it is begun ahead."""
        if lane.prefilling or any(lane.deeper) or not all(s.foreseeable for s in lane.decoding):
            return False
        return not self._drafts_pay(variant, list(lane.decoding))

    def _form_tick(self, ahead: bool) -> Tick | None:
        ready = [variant for variant, lane in self._lanes.items() if lane.deepest() is not None]
        for variant in sorted(ready, key=self._served):
            lane = self._lanes[variant]
            if lane.deepest() is None:  # preempted meanwhile, for a variant tried before
                continue
            stage = self._next_stage(variant, lane)
            rests = ahead and not stage and len(ready) == 1 and self._rests(variant, lane)
            rows = self._take_deeper(lane, stage) if stage else self._take_ready(lane, drafts=not rests)
            if rows:
                return Tick(variant, stage, self._last_stage(stage, rows), tuple(rows))
        return None

    def _next_stage(self, variant: Variant, lane: Lane) -> int:
        if not any(lane.deeper):  # nearly always: without it what follows takes as long as forming the tick
            return 0
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

    def _lane(self, variant: Variant) -> Lane:
        lane = self._lanes.get(variant)
        if lane is None:
            lane = self._lanes[variant] = Lane(deeper=[{} for _ in range(self._plan.stages - 1)])
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

    def _take_deeper(self, lane: Lane, stage: int) -> list[Row]:
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

    def _take_ready(self, lane: Lane, *, drafts: bool) -> list[Row]:
        """Decode steps first, then chunks of prompts with what the token budget leaves (never nothing)."""
        rows: list[Row] = []
        taken: set[Sequence] = set()
        for ready in (lane.decoding, lane.prefilling):
            if not ready:
                continue
            left = self._budget if ready is lane.decoding else self._prompt_room(rows, len(ready))
            for sequence in list(ready):
                if left <= 0:
                    break
                if sequence not in ready:  # preempted while this tick was put together
                    continue
                row = next_row(sequence, left, max_owed=self._max_owed, pool=self._pool, drafts=drafts)
                tokens = row.tokens
                if rows and tokens > left:  # it takes others along; in the next tick it comes first
                    break
                if not self._make_room(sequence, row.stop, taken):
                    continue
                del ready[sequence]
                taken.add(sequence)
                left -= tokens
                rows.append(row)
        return rows

    def _prompt_room(self, rows: list[Row], prompts: int) -> int:
        """Tokens of prompts that may share a tick with these decode steps: it takes at most about twice as long then.

        Where more `prompts` wait than there are steps, so many times longer: what a step loses each of them gains.
        """
        tokens = sum(row.tokens for row in rows)
        room = max(self._budget - tokens, 1)
        if not rows:
            return room
        variant = rows[0].sequence.variant
        stages = [self._costs.stages[variant, stage] for stage in range(self._plan.stages)]
        if any(cost.each is None or not cost.weight for cost in stages):
            return room
        step = sum(cost.of(tokens) for cost in stages) + self._costs.around.of(len(rows))
        each = max(
            sum(max(cost.each or 0.0, cost.slope) for cost in stages), 1e-9
        )  # few together cost more each
        share = _CHUNK_SHARE * max(1.0, prompts / len(rows))
        return min(room, max(int(share * step / each), LEAST_CHUNK))

    def _make_room(self, sequence: Sequence, tokens: int, taken: set[Sequence]) -> bool:
        """Get pages for a sequence's first `tokens` positions, preempting younger ones; False if it must wait."""
        if tokens <= sequence.table.capacity:  # as most often
            return True
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


def _foreseeable(row: Row) -> bool:
    """Whether a row that runs yields a token from which no more than its id is needed for the next step.

    Rows that began deeper, with what waits there, are left aside: some carry a part of a prompt. So are those that
    draft or confirm drafts: how many of them are right says where the next step stands.
    """
    sequence = row.sequence
    drafts = sequence.drafts or sequence.pending or row.threshold is not None
    known = row.positions and not (sequence.drafter is not None and drafts)
    return bool(known) and sequence.foreseeable and sequence.yields_token(row.positions)


def _missing(sequence: Sequence) -> int:
    """Pages that a sequence still needs to compute its prompt and its first token."""
    return sequence.table.missing(sequence.prefill_target + 1)
