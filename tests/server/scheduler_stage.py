"""The scheduler in a little engine that makes up what comes of its ticks."""

import random
from dataclasses import dataclass, field

from exeunt.compression.variant import Variant
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import Scheduler
from exeunt.server.sequence import Sequence, Status
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick

FULL, SMALL = Variant(), Variant("int4", "int4")
PAGE_TOKENS = {FULL: 4, SMALL: 12}
OFF, LEAVE = ExitPolicy(), ExitPolicy("approximate", threshold=0.5)


@dataclass
class Stage:
    """A little engine: applies made-up outcomes to the scheduler's ticks and checks what every tick must hold."""

    pages: int = 40
    max_num_seqs: int = 6
    budget: int = 16
    plan: StagePlan = field(default_factory=lambda: StagePlan(8, (1, 4)))
    seed: int = 0
    run_through: bool = False
    costs: StageCosts | None = None
    ahead: bool = False  # begin ticks before their turn, where the scheduler knows them
    now: float = 0.0

    def __post_init__(self) -> None:
        self.pool = PagePool(self.pages)
        self.scheduler = Scheduler(
            self.plan,
            self.pool,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            policy="run-through" if self.run_through else "queues",
            costs=self.costs,
            clock=lambda: self.now,
        )
        self.dice = random.Random(self.seed)
        self.wanted: dict[Sequence, int] = {}
        self.blocks_run: dict[Sequence, list[tuple[int, int]]] = {}
        self.finished: list[Sequence] = []
        self.started: list[Sequence] = []  # in the order in which they started for the first time
        self.begun: Tick | None = None

    def add(self, prompt: int, new: int, variant: Variant = FULL, exits: ExitPolicy = OFF) -> Sequence:
        table = PageTable(self.pool, PAGE_TOKENS[variant])
        sequence = Sequence(f"s{len(self.wanted)}", variant, exits, [1] * prompt, prompt, table)
        sequence.limit, sequence.foreseeable = prompt + new, exits is OFF
        self.wanted[sequence] = new
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Tick | None:
        self.now += 0.004
        tick = self.turn()
        self.started += [s for s in self.scheduler.take_admitted() if s not in self.started]
        self.scheduler.take_preempted()
        if tick is None:
            return None
        self.check(tick)
        self.begun = self.scheduler.tick_ahead(tick) if self.ahead else None
        for row in tick.rows:
            self.apply(tick, row)
        self.scheduler.served(tick.variant, 0.001 * len(tick.rows))
        return tick

    def turn(self) -> Tick | None:
        """The tick that was begun, without the sequences that have ended since; else what the scheduler says."""
        begun, self.begun = self.begun, None
        rows = () if begun is None else tuple(r for r in begun.rows if r.sequence.status is Status.RUNNING)
        if begun is None or not rows:
            return self.scheduler.next_tick()
        self.scheduler.resume(begun)
        return Tick(begun.variant, begun.first_stage, begun.last_stage, rows)

    def check(self, tick: Tick) -> None:
        sequences = [row.sequence for row in tick.rows]
        assert len(set(sequences)) == len(sequences)
        assert {s.variant for s in sequences} == {tick.variant}
        assert all(s.status is Status.RUNNING for s in sequences)
        assert tick.tokens <= max(self.budget, self.max_num_seqs + 1)
        for row in tick.rows:
            positions = row.positions or row.sequence.pending[row.stage]
            assert positions == sorted(set(positions))
            assert positions[-1] < row.sequence.table.capacity
            assert positions[0] >= row.sequence.computed
        held = [s.table for s in self.scheduler.running_sequences()]
        self.pool.check_integrity(held)

    def apply(self, tick: Tick, row: Row) -> None:
        sequence, last = row.sequence, tick.last_stage == self.plan.last
        positions = sequence.pending.pop(row.stage, []) + row.positions
        leaves = not last and row.may_leave and len(positions) == 1 and self.dice.random() < 0.5
        recorded = {p for p in positions if sequence.recorded_stage(p) == tick.last_stage}
        if sequence.yields_token(positions) and (last or leaves):
            sequence.tokens.append(1)
            sequence.left_at.append(tick.last_stage)
            if sequence.generated == self.wanted[sequence]:
                self.scheduler.remove(sequence)
                self.finished.append(sequence)
                return
        stay = [] if last or leaves else [p for p in positions if p not in recorded]
        if stay:
            sequence.put_back(tick.last_stage + 1, stay)
            self.scheduler.move_on(row, tick.last_stage + 1)
        else:
            sequence.computed = row.stop
            self.scheduler.finish_pass(sequence)
