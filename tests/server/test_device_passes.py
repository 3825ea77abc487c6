"""Steps whose exits the device decides: the same answers, exits, accounts and audits as steps that wait for gates."""

import math
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from exeunt.compression.decoder import Decoder
from exeunt.compression.model import LoadedModel
from exeunt.server.audit import Audit
from exeunt.server.auditor import Auditor, TickAudits
from exeunt.server.device_run import DeviceRun
from exeunt.server.drafting import Drafter, Proposal
from exeunt.server.request import ExitPolicy
from exeunt.server.runner import Runner
from exeunt.server.sequence import Status
from exeunt.server.stages import StagePlan
from exeunt.server.tick_run import Piece, StageRun, StageShare, TickRun
from tests.compression.pass_by_rows import pass_by_rows
from tests.server.conftest import BLOCKS
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    INT4_KV,
    LEAVE,
    OFF,
    PROMPT,
    VERIFIED,
    WAIT_S,
    Begun,
    Taken,
    go_by_stages,
    running,
)
from tests.server.fixed_drafter import RestingDrafter
from tests.server.test_soak import Asked, answer_of, random_request


class Audits:
    """What audits found, whichever tick they ended in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._found: list[tuple[str, Audit]] = []
        end = Auditor.end_tick

        def ended(auditor: Auditor, emitted: Any) -> TickAudits:
            outcome = end(auditor, emitted)
            self._found += [(row.sequence.name, audit) for row, audit in outcome.found]
            return outcome

        monkeypatch.setattr(Auditor, "end_tick", ended)

    def taken(self) -> dict[tuple[str, int], Audit]:
        """Those since the last call, by sequence and position."""
        found, self._found = self._found, []
        return {(name, audit.position): audit for name, audit in found}


def looks_up(_: object) -> Drafter:
    """A drafter that asks no exit: ticks whose rows do go by stages."""
    return LooksUp()


class LooksUp:
    """Proposes the last token again, two times over, now and then."""

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        return Proposal(tokens=(tokens[-1],) * min(room, 2)) if len(tokens) % 3 == 0 else Proposal()

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        """Learns nothing."""

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        """Nothing, where it would propose nothing."""
        return math.inf if (len(tokens) + 1) % 3 == 0 else 0.0


def beside_graphs(monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> None:
    """Have ticks run as on a GPU, a pass of the device being one call."""
    monkeypatch.setattr(Runner, "has_graphs", property(lambda _: True))
    by_rows = partial(pass_by_rows, model.exits)
    monkeypatch.setattr(
        Decoder, "run_pass", lambda *given: by_rows(*given)
    )  # a method, which a partial is not
    go_by_stages(monkeypatch)


PROPAGATE: list[dict[str, Any]] = [
    {"exits": LEAVE, "max_new_tokens": 40},
    {"exits": LEAVE, "temperature": 1.0, "seed": 3, "n": 2, "max_new_tokens": 40},
    {"exits": OFF, "max_new_tokens": 30},
    {"exits": ExitPolicy("approximate", 0.3, None, "propagate"), "temperature": 1.3, "seed": 5, "top_k": 9},
    {"exits": LEAVE, "repetition_penalty": 1.2, "max_new_tokens": 35},
    {"exits": LEAVE, "temperature": 1.3, "seed": 2, "ignore_eos": False, "max_new_tokens": 200},
    {"exits": LEAVE, "variant": INT4_KV, "max_new_tokens": 50},
    {"exits": LEAVE, "prompt": PROMPT[:1], "max_new_tokens": 1},
]
BACKFILLED: list[dict[str, Any]] = [
    {"exits": BACKFILL, "max_new_tokens": 60},
    {"exits": BACKFILL, "temperature": 1.0, "seed": 3, "n": 2, "max_new_tokens": 40},
    {
        "exits": ExitPolicy("approximate", 0.2, None, "backfill"),
        "max_new_tokens": 60,
    },  # goes deep for what it owes
    {"exits": ExitPolicy("approximate", 0.7, None, "backfill"), "temperature": 1.3, "seed": 5, "top_p": 0.8},
    {"exits": BACKFILL, "variant": INT4_KV, "repetition_penalty": 1.2, "max_new_tokens": 50},
    {"exits": OFF, "prompt": PROMPT * 6, "max_new_tokens": 30},  # in chunks
]
ALL = [*PROPAGATE, *BACKFILLED, {"exits": VERIFIED, "max_new_tokens": 60}]
OFTEN = ExitPolicy("approximate", 0.2, None, "propagate")
COUNTED = ("generation_tokens", "blocks_executed", "blocks_skipped", "blocks_wasted", "block_passes")


def _answers(
    model: LoadedModel, requests: list[dict[str, Any]], audit_share: float
) -> tuple[list[Any], dict[str, float]]:
    calls = model.decoder(FULL).block_calls  # which serves both formats of the KV cache
    before = sum(calls.tokens)
    limits: dict[str, Any] = {"max_num_seqs": 18, "max_num_batched_tokens": 48}
    with running(model, new_drafter=looks_up, audit_share=audit_share, **limits) as bench:
        with bench.held():
            asked = [bench.ask(**one) for one in requests]
        heard = [answer_of(one.wait()) for one in asked]
        assert bench.engine.wait_idle(WAIT_S)
        counted = {name: bench.value(f"exeunt_{name}_total") for name in COUNTED}
        counted["audits"] = bench.value("exeunt_audited_tokens_total")
        counted["agreements"] = bench.value("exeunt_audit_agreements_total")
    counted["called"] = sum(calls.tokens) - before
    return heard, counted


@pytest.mark.parametrize("audit_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("requests", [PROPAGATE, BACKFILLED, ALL], ids=["propagate", "backfill", "all modes"])
def test_answers_and_accounts_are_those_of_ticks_by_stages(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    requests: list[dict[str, Any]],
    audit_share: float,
) -> None:
    go_by_stages(monkeypatch)
    audits = Audits(monkeypatch)
    wanted, counts = _answers(tiny_model, requests, audit_share)
    found = audits.taken()
    beside_graphs(monkeypatch, tiny_model)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    answers, counted = _answers(tiny_model, requests, audit_share)
    assert answers == wanted
    assert audits.taken() == found
    assert any(token[2] != "final" for answer in answers for choice in answer[1] for token in choice)
    assert max(asking for _, asking in taken.rows) >= 4
    assert (len(begun.rows) > 10) == (requests is PROPAGATE)
    vain = counted["blocks_wasted"] - counts["blocks_wasted"]  # steps begun for answers that ended by a token
    assert vain % BLOCKS == 0
    for name in ("generation_tokens", "blocks_executed", "blocks_skipped", "audits", "agreements"):
        assert counted[name] == counts[name], name
    for name in ("block_passes", "called"):
        assert counted[name] == counts[name] + vain, name
    assert (counted["audits"] > 0) == (audit_share > 0)


def test_every_step_of_an_answer_that_leaves_is_begun_ahead(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_graphs(monkeypatch, tiny_model)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    runs: list[StageRun] = []
    with running(tiny_model) as bench:
        bench.engine._on_stages = runs.append
        heard = bench.answer(exits=LEAVE, max_new_tokens=24)
        assert bench.engine.wait_idle(WAIT_S)
        entered = [bench.value("exeunt_step_batch_size_sum", stage=str(stage)) for stage in range(3)]
    assert begun.rows == [1] * 23
    assert taken.rows == [(1, 1)] * 23
    first, second, last = (heard.exits().count(name) for name in ("block_1", "block_3", "final"))
    assert min(first, second, last) > 0
    assert entered == [24, 24 - first, last]
    told = [run for run in runs if run.tokens == 1]  # not the prompt's
    counts = [sum(run.tokens for run in told if run.stages == range(at, at + 1)) for at in range(3)]
    assert counts == [23, 23 - first, last - 1]
    for one, other in pairwise(told):  # stages of one tick share its time by their blocks, which are as many
        if other.stages.start:
            assert other.seconds == pytest.approx(one.seconds)
    assert heard.finish.summary.depth.blocks_wasted == 0


def test_verified_rows_that_draft_nothing_go_along_in_passes_begun_ahead(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict[str, Any]] = [
        {"exits": VERIFIED, "max_new_tokens": 40},
        {"exits": LEAVE, "max_new_tokens": 40},
        {"exits": LEAVE, "temperature": 1.0, "seed": 3, "max_new_tokens": 40},
        {"exits": VERIFIED, "temperature": 1.0, "seed": 4, "max_new_tokens": 40},
    ]

    def answers() -> list[Any]:
        with running(tiny_model, new_drafter=lambda _: RestingDrafter()) as bench:
            with bench.held():
                asked = [bench.ask(**one) for one in requests]
            return [answer_of(one.wait()) for one in asked]

    go_by_stages(monkeypatch)
    wanted = answers()
    beside_graphs(monkeypatch, tiny_model)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    assert answers() == wanted
    assert begun.rows == [4] * 39
    assert begun.drafting == 2 * 39
    assert taken.rows == [(4, 2)] * 39


@pytest.mark.parametrize("exits", [VERIFIED, OFF], ids=["verified", "off"])
def test_what_asks_no_exit_but_the_one_that_drafts_is_no_pass_of_the_device(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    beside_graphs(monkeypatch, tiny_model)
    taken = Taken(monkeypatch)
    with running(tiny_model) as bench:
        bench.answer(exits=exits, max_new_tokens=24)
    assert taken.rows == []


def test_where_survivors_wait_at_exits_there_are_no_passes_of_the_device(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model, run_through=False) as bench:
        wanted = answer_of(bench.answer(exits=LEAVE))
    beside_graphs(monkeypatch, tiny_model)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    with running(tiny_model, run_through=False) as bench:
        assert answer_of(bench.answer(exits=LEAVE)) == wanted
    assert (taken.rows, begun.rows) == ([], [])


def test_where_no_graph_fits_steps_go_by_stages(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_model) as bench:
        wanted = answer_of(bench.answer(exits=LEAVE))
    beside_graphs(monkeypatch, tiny_model)
    asked = [0]

    def refused(*_: Any) -> None:
        asked[0] += 1

    monkeypatch.setattr(Decoder, "run_pass", refused)
    taken, begun = Taken(monkeypatch), Begun(monkeypatch)
    with running(tiny_model) as bench:
        assert answer_of(bench.answer(exits=LEAVE)) == wanted
    assert asked[0] > 20
    assert (taken.rows, begun.rows) == ([], [])


@pytest.mark.parametrize("exits", [LEAVE, BACKFILL], ids=["propagate", "backfill"])
def test_a_crowd_that_comes_and_goes_gets_the_answers_it_gets_alone(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    """Few pages, so that some are preempted; callers who cancel; audits; requests of other kinds in between."""
    dice = random.Random(exits.skipped_kv)
    requests = [random_request(dice, number) for number in range(60)]
    leave = {"exits": exits, "repetition_penalty": 1.0}
    requests = [
        Asked(one.request | leave, scored=False) if not one.scored and dice.random() < 0.7 else one
        for one in requests
    ]
    go_by_stages(monkeypatch)
    with running(tiny_model, max_num_seqs=3) as bench:
        alone = [answer_of(one.send(bench, alone=True).wait()) for one in requests]
    beside_graphs(monkeypatch, tiny_model)
    taken = Taken(monkeypatch)
    with running(
        tiny_model, 16, audit_share=0.3, max_num_seqs=12, max_num_batched_tokens=64, max_num_queued_reqs=100
    ) as bench:
        asked = []
        for request in requests:
            asked.append(request.send(bench))
            if dice.random() < 0.2:
                bench.ask(exits=exits, max_new_tokens=200, temperature=1.0)
                bench.engine.cancel(f"r{bench.count}")
            if dice.random() < 0.3:
                asked[-1].wait()
        crowd = [answer_of(one.wait()) for one in asked]
        preempted = bench.value("exeunt_preemptions_total")
        assert bench.value("exeunt_audited_tokens_total") > 10
    assert sum(asking for _, asking in taken.rows) > 200
    assert preempted > 0
    for request, one, other in zip(requests, crowd, alone, strict=True):
        assert one == other, request


def test_an_answer_that_ended_has_no_audits_run_in_pages_that_may_be_anothers(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_graphs(monkeypatch, tiny_model)
    calls = tiny_model.decoder(FULL).block_calls
    before = sum(calls.tokens)
    noted: list[list[bool]] = []
    note = DeviceRun.note_exits

    left_in_vain: list[int] = []

    def noting(told: DeviceRun, run: Any, left_at: Sequence[int]) -> None:
        alive = [row.sequence.status is Status.RUNNING for row, _ in told.tokens]
        noted.append(alive)
        left = zip(told.with_logits, left_at, strict=True)
        left_in_vain.extend(exit_ for token, exit_ in left if exit_ < told.plan.last and not alive[token])
        note(told, run, left_at)

    monkeypatch.setattr(DeviceRun, "note_exits", noting)
    with running(tiny_model, audit_share=1.0) as bench:
        with bench.held():
            long = bench.ask(exits=LEAVE, max_new_tokens=150)
            some = [
                bench.ask(exits=OFTEN, temperature=1.5, seed=i, ignore_eos=False, max_new_tokens=400)
                for i in range(8)
            ]
        for one in (long, *some):
            one.wait()
        assert bench.engine.wait_idle(WAIT_S)
        counted = sum(bench.value(f"exeunt_blocks_{kind}_total") for kind in ("executed", "wasted"))
    assert any(not alive for step in noted for alive in step)
    assert left_in_vain
    prompts = 9 * (len(PROMPT) - 1) * BLOCKS
    assert sum(calls.tokens) - before == prompts + counted


def test_a_pass_of_the_device_is_told_by_stage() -> None:
    piece = Piece(range(3), 4, 6, by_stage=[StageShare(0, 4, 6, 0.25), StageShare(2, 1, 2, 0.75)])
    told = [(list(run.stages), run.seconds, run.rows, run.tokens) for run in piece.ended(FULL, 8.0)]
    assert told == [([0], 2.0, 4, 6), ([2], 6.0, 1, 2)]


def test_a_pass_begun_ahead_that_fails_behind_its_launch_is_accounted_for(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_graphs(monkeypatch, tiny_model)
    begin = Runner._begin

    def failing(runner: Runner, ahead: TickRun, *rest: Any) -> bool:
        assert begin(runner, ahead, *rest)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Runner, "_begin", failing)
    calls = tiny_model.decoder(FULL).block_calls
    before = sum(calls.tokens)
    with running(tiny_model) as bench:
        bench.answer(exits=LEAVE, max_new_tokens=12)
        assert bench.engine.wait_idle(WAIT_S)
        counted = sum(bench.value(f"exeunt_blocks_{kind}_total") for kind in ("executed", "wasted"))
    assert sum(calls.tokens) - before == (len(PROMPT) - 1) * BLOCKS + counted


def test_stages_that_had_tokens_share_the_time_by_their_blocks() -> None:
    unread: Any = None
    told = DeviceRun(StagePlan(6, (0, 2)), *[unread] * 8)  # stages of one, two and three blocks
    outcome: Any = SimpleNamespace(tokens=[4, 3, 0], rows=[4, 2, 0])
    assert told._by_stage(outcome) == [StageShare(0, 4, 4, 1 / 3), StageShare(1, 2, 3, 2 / 3)]


def test_a_step_begun_ahead_counts_from_its_launch_at_the_earliest(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An audit waits for the step behind it; one that was done before that step's launch is no time of its."""
    beside_graphs(monkeypatch, tiny_model)
    began: list[tuple[float, float, float]] = []
    run = Runner.run

    def noted(runner: Runner, tick: Any, *rest: Any) -> Any:
        found = run(runner, tick, *rest)
        ahead = runner._ahead
        if ahead is not None:
            began.append((ahead.began, launched[id(ahead)], runner._audited))
        return found

    launched: dict[int, float] = {}
    begin = Runner._begin

    def beginning(runner: Runner, ahead: TickRun, *rest: Any) -> bool:
        launched[id(ahead)] = ahead.began
        return begin(runner, ahead, *rest)

    monkeypatch.setattr(Runner, "run", noted)
    monkeypatch.setattr(Runner, "_begin", beginning)
    monkeypatch.setattr(Auditor, "take_seconds", lambda _: 1e3)  # longer than all of this takes
    with running(tiny_model, audit_share=1.0) as bench:
        bench.answer(exits=LEAVE, max_new_tokens=12)
    assert len(began) >= 10
    assert all(counted == launch for counted, launch, audited in began if audited)
    assert any(audited for _, _, audited in began)
