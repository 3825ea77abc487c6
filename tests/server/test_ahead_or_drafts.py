"""When steps are begun ahead and when they draft: whole answers on made-up costs, with the drafter that serves."""

import math
import random
from dataclasses import dataclass, field

import pytest

from exeunt.compression.variant import Variant
from exeunt.server.drafters import AdaptiveDrafters
from exeunt.server.drafting import AdaptiveDrafter, ExitWorth
from exeunt.server.pages import PagePool, PageTable
from exeunt.server.request import ExitPolicy, GenerationRequest, SamplingParams
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

    known = True

    def __init__(self, gain: float = 1e-6) -> None:
        super().__init__()
        self.gain = gain

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
    costs: StageCosts = field(default_factory=StageCosts)
    leaves: float = 0.0  # share of the tokens that asked and leave at the exit that drafts
    ahead: list[bool] = field(default_factory=list)  # of each decode step, whether it was begun ahead
    asks: int = 0
    longest_chain: int = 0  # drafts of the exit that waited at once
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.plan, self.dice = StagePlan(8, (1, 4)), random.Random(5)
        pool = PagePool(sum(len(text) // 16 + 2 for text in self.texts))
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
            drafter = AdaptiveDrafter(
                lambda: self.costs.drafting(VARIANT, 1, 2),
                self.worth,
                lambda rows: self.costs.begun_ahead(VARIANT, rows),
            )
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
        if row.threshold is not None and self.dice.random() < self.leaves:  # a draft, and always a right one
            sequence.put_back(2, row.positions)
            sequence.computed = row.stop
            sequence.tokens.append(text[len(sequence.tokens)])
            sequence.drafts.append(1)
            self.longest_chain = max(self.longest_chain, len(sequence.drafts))
            self.scheduler.finish_pass(sequence)
            return
        sequence.pending.clear()
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
    timed = Timed(novels(1, 300), worth=PaysALittle(3e-3)).run()
    assert timed.asks > 0.8 * len(timed.ahead)


@pytest.mark.parametrize("rows", [4, 8, 32, 64])
def test_what_one_stream_has_shown_says_nothing_of_a_crowd(rows: int) -> None:
    costs = StageCosts()
    Timed(novels(1, 300), costs=costs).run()
    timed = Timed(novels(rows), costs=costs).run()
    assert sum(timed.ahead) > 0.9 * len(timed.ahead)


def test_a_crowd_that_repeats_itself_is_drafted_after_one_stream_that_did_not() -> None:
    costs = StageCosts()
    Timed(novels(1, 300), costs=costs).run()
    Timed(novels(32, 200), costs=costs).run()
    timed = Timed(repetitive(32), costs=costs).run()
    assert len(timed.ahead) < 0.35 * 392


def test_a_head_start_that_has_gained_nothing_is_tried_again() -> None:
    """Steps begun ahead were slow once, as beside another process, and those that waited were not."""
    costs = StageCosts()
    for _ in range(9):
        costs.ticked(8, 1e-3)
        costs.stepped(VARIANT, 8, 1.0, ahead=True)
        costs.stepped(VARIANT, 8, 2e-3, ahead=False)
    timed = Timed(half_repeated(8, 2400, 4), costs=costs, device=2e-3, host=1.6e-2).run()
    assert len(timed.ahead) > 1500
    assert sum(timed.ahead[:400]) < 100
    assert sum(timed.ahead[600:]) > 0.9 * len(timed.ahead[600:])


@pytest.mark.parametrize("rows", [1, 8])
def test_steps_that_become_slower_are_learned(rows: int) -> None:
    """As where short contexts are followed by long ones: drafts pay then, and did not before."""
    costs = StageCosts()
    quick = Timed(half_repeated(rows), costs=costs, device=2e-3, host=4e-3).run()
    assert sum(quick.ahead) > 0.5 * len(quick.ahead)
    timed = Timed(half_repeated(rows), costs=costs, device=2e-2, host=2e-3).run()
    fresh = Timed(half_repeated(rows), device=2e-2, host=2e-3).run()
    assert timed.seconds < 1.3 * fresh.seconds


@pytest.mark.parametrize("worth", [PaysALittle, ExitWorth])
def test_an_exit_that_is_due_is_asked_before_anything_is_looked_up(worth: type[ExitWorth]) -> None:
    """A text of few tokens, in which something is found nearly everywhere and is mostly wrong."""
    dice = random.Random(3)
    text = [dice.randrange(6) for _ in range(3000)]
    timed = Timed([text], worth=worth()).run()
    always_ahead = len(text) * (timed.device + timed.token)
    assert timed.asks > 20
    assert timed.seconds < 1.06 * always_ahead


def test_exits_of_a_batch_keep_no_step_waiting_whose_deep_pass_runs_anyway() -> None:
    timed = Timed(novels(8, 300), worth=PaysALittle(3e-4), leaves=0.7, host=2e-3).run()
    assert sum(timed.ahead) > 0.85 * len(timed.ahead)


def half_repeated(count: int, length: int = 600, word: int = 12) -> list[list[int]]:
    """Texts of which every second look-up is right, and then for some tokens."""
    dice = random.Random(7)
    words = [[dice.randrange(400) for _ in range(word)] for _ in range(240 // word)]
    return [[token for _ in range(length // word) for token in dice.choice(words)] for _ in range(count)]


def test_drafts_of_the_exit_form_chains_where_the_exit_pays() -> None:
    timed = Timed(novels(1, 300), worth=PaysALittle(3e-3), leaves=0.8).run()
    assert timed.longest_chain > 4


def test_the_drafters_that_serve_know_what_steps_begun_ahead_take() -> None:
    costs = StageCosts()
    for _ in range(9):
        costs.stepped(VARIANT, 8, 4e-3, ahead=True)
    request = GenerationRequest("r", (1,), SamplingParams(), VARIANT, ExitPolicy("verified"))
    drafter = AdaptiveDrafters(StagePlan(8, (1, 4)), costs).new(request)
    assert isinstance(drafter, AdaptiveDrafter)
    assert drafter.ahead is not None
    assert drafter.ahead(8) == pytest.approx(0.5e-3)


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
    assert costs.head_start(VARIANT, 4) == math.inf  # it is to be tried
    assert costs.begun_ahead(VARIANT, 4) is None
    for _ in range(9):
        costs.stepped(VARIANT, 4, 2e-3, ahead=True)
    assert costs.begun_ahead(VARIANT, 4) == pytest.approx(0.5e-3)
    assert costs.head_start(VARIANT, 4) == 0.0
    assert costs.head_start(VARIANT, 5) == math.inf  # rows by powers of two
    for _ in range(9):
        costs.ticked(4, 1e-3)
    assert costs.head_start(VARIANT, 4) == pytest.approx(1e-3)
    for _ in range(9):
        costs.stepped(VARIANT, 4, 5e-3, ahead=False)
    assert costs.head_start(VARIANT, 4) == pytest.approx(3e-3)
    costs.stepped(
        VARIANT, 4, 5e-1, ahead=False
    )  # held up by something else: it counts as twice what was expected
    assert costs.head_start(VARIANT, 4) == pytest.approx(3.5e-3)
    for _ in range(40):
        costs.stepped(VARIANT, 4, 2e-2, ahead=False)
    assert costs.head_start(VARIANT, 4) == pytest.approx(1.8e-2, rel=0.1)
    for _ in range(513):
        costs.ticked(4, 1e-3)
    assert costs.head_start(VARIANT, 4) == math.inf  # long ago
