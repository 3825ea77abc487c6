"""When steps are begun ahead and when they draft: whole answers on made-up costs, with the drafter that serves."""

import random
from dataclasses import dataclass, field

import pytest

from exeunt.compression.variant import Variant
from exeunt.server.drafting import AdaptiveDrafter, ExitWorth
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy
from exeunt.server.row import Row
from exeunt.server.scheduler import Scheduler
from exeunt.server.sequence import Sequence
from exeunt.server.stage_costs import StageCosts
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick

VARIANT = Variant()
PROMPT = 8


class GivenUp(ExitWorth):
    """An exit that is not asked."""

    def may_ask(self) -> bool:
        return False


class PaysALittle(ExitWorth):
    """An exit of which it is known that asking it saves a microsecond."""

    gain = 1e-6
    known = True

    def may_ask(self) -> bool:
        return True

    def judged(self, asks: int, seconds: float) -> None:
        pass


@dataclass
class Timed:
    """Answers whose texts are given, on a device and a host of which every tick's time is known."""

    texts: list[list[int]]
    device: float = 4e-3  # seconds of a step, whatever its rows
    token: float = 4e-5  # more for each token
    host: float = 2e-3  # beside it, but for steps begun ahead
    worth: ExitWorth = field(default_factory=GivenUp)
    ahead: list[bool] = field(default_factory=list)  # of each decode step, whether it was begun ahead
    asks: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.costs, self.plan, self.begun = StageCosts(), StagePlan(8, (1, 4)), None
        pool = PagePool(64 * len(self.texts))
        self.scheduler = Scheduler(
            self.plan,
            pool,
            max_num_seqs=99,
            max_num_batched_tokens=512,
            policy="run-through",
            costs=self.costs,
        )
        self.of: dict[Sequence, list[int]] = {}
        for number, text in enumerate(self.texts):
            drafter = AdaptiveDrafter(lambda: self.costs.drafting(VARIANT, 1, 2), self.worth)
            sequence = Sequence(
                f"s{number}", VARIANT, ExitPolicy("verified"), text[:PROMPT], PROMPT, PageTable(pool, 16)
            )
            sequence.limit, sequence.foreseeable, sequence.drafter = len(text), True, drafter
            self.of[sequence] = text
            self.scheduler.add(sequence)

    begun: Tick | None = field(init=False, default=None)

    def run(self, most: int = 10_000) -> "Timed":
        """Go on until all texts are there, or for so many steps."""
        while self.scheduler.running + self.scheduler.waiting and len(self.ahead) < most:
            self._step()
        return self

    def _step(self) -> None:
        tick, was = self.begun, self.begun is not None
        if tick is None:
            tick = self.scheduler.next_tick(ahead=True)
        else:
            self.scheduler.resume(tick)
        assert tick is not None
        rows, tokens, plain = len(tick.rows), tick.tokens, tick.plain
        self.asks += sum(row.threshold is not None for row in tick.rows)
        self.begun = self.scheduler.tick_ahead(tick)
        on_device = self.device + self.token * tokens
        took = on_device if was else on_device + self.host
        for stage in range(self.plan.stages):
            blocks = self.plan.stop(stage) - self.plan.start(stage)
            self.costs.ran(VARIANT, stage, tokens, on_device * blocks / self.plan.blocks, rows)
        if not was:
            self.costs.ticked(rows, self.host / 2)  # the other half is told with the stages
        if plain and was == (self.begun is not None):
            self.costs.stepped(VARIANT, rows, took, ahead=was)
        if not any(row.sequence.prefilling for row in tick.rows):
            self.ahead.append(was)
        self.seconds += took
        for row in tick.rows:
            self._settle(row)
        self.worth.ticked()

    def _settle(self, row: Row) -> None:
        sequence, text = row.sequence, self.of[row.sequence]
        assert sequence.drafter is not None
        start, drafts = sequence.confirmed, sequence.tokens[sequence.confirmed :]
        pairs = zip(drafts, text[start:], strict=False)
        right = next((i for i, (one, other) in enumerate(pairs) if one != other), len(drafts))
        sequence.drafter.settled(tuple(sequence.drafts), right)
        sequence.reject_drafts(0)
        sequence.tokens += text[start : start + right + 1]
        sequence.left_at += [self.plan.last] * (len(sequence.tokens) - start)
        sequence.computed = len(sequence.tokens) - 1
        sequence.table.truncate(len(sequence.tokens))
        if len(sequence.tokens) >= len(text):
            self.scheduler.remove(sequence)
        else:
            self.scheduler.finish_pass(sequence)


def novels(count: int, length: int = 400) -> list[list[int]]:
    """Texts whose pairs of tokens come again and go on in other ways."""
    dice = random.Random(3)
    return [[dice.randrange(40) for _ in range(length)] for _ in range(count)]


def repetitive(count: int, length: int = 400) -> list[list[int]]:
    """Texts that say the same over and over."""
    return [[(i * 7 + number) % 23 for i in range(length)] for number in range(count)]


@pytest.mark.parametrize("streams", [1, 16, 64])
def test_texts_that_do_not_repeat_themselves_are_begun_ahead(streams: int) -> None:
    timed = Timed(novels(streams)).run()
    assert sum(timed.ahead) > 0.9 * len(timed.ahead)
    floor = len(timed.ahead) * (timed.device + timed.token * streams)  # what exits off would take
    assert timed.seconds < 1.1 * floor


@pytest.mark.parametrize("streams", [1, 16])
def test_texts_that_repeat_themselves_are_drafted(streams: int) -> None:
    timed = Timed(repetitive(streams)).run()
    assert sum(timed.ahead) < 40  # the first 25 tokens have nothing to be looked up in
    assert len(timed.ahead) < 0.35 * 392  # several tokens a step


def test_a_text_that_begins_to_repeat_itself_is_drafted_from_there_on() -> None:
    (novel,) = novels(1)
    timed = Timed([novel + novel]).run()
    assert sum(timed.ahead[:380]) > 300
    assert len(timed.ahead) < 400 + 0.4 * 400


def test_drafts_wait_for_no_token_where_the_host_has_more_to_do_than_they_save() -> None:
    """Of two streams one could draft one token in four rightly: not enough where a head start halves the step."""
    novel, other = novels(2)
    timed = Timed([novel, other], device=1e-3, token=1e-5, host=3e-3).run()
    assert sum(timed.ahead) > 0.9 * len(timed.ahead)


def test_an_exit_that_pays_less_than_a_head_start_is_asked_now_and_then() -> None:
    timed = Timed(novels(1, 1500), worth=PaysALittle()).run()
    steps = len(timed.ahead)
    assert steps / 90 < timed.asks < steps / 50
    assert sum(timed.ahead) > 0.9 * steps


def test_an_exit_that_pays_more_than_a_head_start_is_asked_always() -> None:
    worth = PaysALittle()
    worth.gain = 3e-3
    timed = Timed(novels(1, 300), worth=worth).run()
    assert timed.asks > 0.8 * len(timed.ahead)


def test_how_long_a_step_takes_is_told_of_any_number_of_rows() -> None:
    costs = StageCosts()
    for _ in range(30):
        costs.ran(VARIANT, 0, 64, 1e-3, rows=64)
        costs.ran(VARIANT, 1, 64, 1e-3, rows=2)
    assert costs.stages[VARIANT, 0].of(64) == pytest.approx(1e-3)
    assert costs.stages[VARIANT, 0].each is None
    assert not costs.stages[VARIANT, 1].weight
    assert costs.stages[VARIANT, 1].each == pytest.approx(1e-3 / 64)


def test_a_head_start_is_what_steps_have_shown_it_to_be() -> None:
    costs = StageCosts()
    assert costs.head_start(VARIANT, 4) == float("inf")  # it is to be tried
    for _ in range(9):
        costs.stepped(VARIANT, 4, 2e-3, ahead=True)
    assert costs.head_start(VARIANT, 4) == 0.0
    for _ in range(9):
        costs.ticked(4, 1e-3)
    assert costs.head_start(VARIANT, 4) == pytest.approx(1e-3)
    for _ in range(9):
        costs.stepped(VARIANT, 4, 5e-3, ahead=False)
    assert costs.head_start(VARIANT, 4) == pytest.approx(3e-3)
