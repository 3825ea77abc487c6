"""Ticks that run whole: the same answers, accounts and audits as a stage at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.server.auditor import Auditor
from exeunt.server.request import ExitPolicy, FailureEvent, SamplingParams
from exeunt.server.row_sampling import RowSampling
from exeunt.server.sampling import start_each
from exeunt.server.stages import StagePlan
from exeunt.server.tick import Tick
from exeunt.server.tick_run import StageRun
from exeunt.server.whole_passes import WholePass, WholePasses
from tests.server.engine_bench import (
    BACKFILL,
    FULL,
    LEAVE,
    LINEAR,
    NATIVE,
    OFF,
    VERIFIED,
    WAIT_S,
    Heard,
    go_by_stages,
    running,
    score,
)
from tests.server.fixed_drafter import FixedDrafter
from tests.server.test_soak import answer_of

pytestmark = NATIVE
STRICT = ExitPolicy("approximate", threshold=0.8)
LATER = ExitPolicy("approximate", threshold=0.7, skipped_kv="backfill")
COUNTERS = (
    "generation_tokens",
    "exit_tokens",
    "blocks_executed",
    "blocks_skipped",
    "blocks_wasted",
    "block_passes",
    "drafts",
    "drafts_accepted",
    "audited_tokens",
    "audit_agreements",
)


class Whole:
    """How many ticks ran whole, of how many; `allowed` False has none do so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, allowed: bool) -> None:
        self.ticks, self.whole = 0, 0
        of: Callable[..., WholePass | None] = WholePasses.of

        def counted(passes: WholePasses, tick: Tick, *given: Any) -> WholePass | None:
            self.ticks += 1
            found = of(passes, tick, *given) if allowed else None
            self.whole += found is not None
            return found

        monkeypatch.setattr(WholePasses, "of", counted)


def _spoken(
    model: LoadedModel, policies: list[ExitPolicy], **limits: Any
) -> tuple[list[Heard], dict[str, float], list[StageRun]]:
    runs: list[StageRun] = []
    with running(model, max_num_seqs=8, new_drafter=lambda _: FixedDrafter(0.4, 2), **limits) as bench:
        bench.engine._on_stages = runs.append
        with bench.held():
            asked = [
                bench.ask(
                    prompt=tuple((7 * i + j * j) % 256 for j in range(5 + 9 * i)),
                    exits=exits,
                    variant=variant,
                    temperature=0.9 * (i % 2),
                    seed=i,
                    repetition_penalty=1.2 if i == 2 else 1.0,
                    max_new_tokens=30,
                )
                for variant in (FULL, LINEAR)
                for i, exits in enumerate(policies)
            ]
        heard = [one.wait() for one in asked]
        assert bench.engine.wait_idle(WAIT_S)
        counted = {name: bench.value(f"exeunt_{name}_total") for name in COUNTERS}
        counted["steps"] = sum(
            (stage + 1) * bench.value("exeunt_step_batch_size_sum", stage=str(stage)) for stage in range(3)
        )
    return heard, counted, runs


@pytest.mark.parametrize("audit_share", [0.0, 0.4])
@pytest.mark.parametrize(
    "policies",
    [
        [OFF, OFF, OFF],
        [LEAVE, STRICT, LEAVE],
        [LEAVE, OFF, STRICT, OFF],
        [BACKFILL, LATER, BACKFILL],
        [VERIFIED, VERIFIED, VERIFIED],
        [LEAVE, BACKFILL, VERIFIED, OFF],
    ],
    ids=["off", "propagate", "propagate and off", "backfill", "verified", "all modes"],
)
def test_answers_accounts_and_audits_are_those_of_stages(
    tiny_model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    policies: list[ExitPolicy],
    audit_share: float,
) -> None:
    with monkeypatch.context() as patch:
        none = Whole(patch, allowed=False)
        wanted, counts, stages = _spoken(tiny_model, policies, audit_share=audit_share)
    some = Whole(monkeypatch, allowed=True)
    found, counted, pieces = _spoken(tiny_model, policies, audit_share=audit_share)
    assert none.whole == 0
    assert some.whole == some.ticks > 0
    assert [answer_of(one) for one in found] == [answer_of(one) for one in wanted]
    assert [one.exits() for one in found] == [one.exits() for one in wanted]
    assert [one.finish.summary.depth for one in found] == [one.finish.summary.depth for one in wanted]
    assert counted == counts
    assert (counted["audited_tokens"] > 0) == (audit_share > 0 and policies[0] in (LEAVE, BACKFILL))
    assert (counted["drafts"] > 0) == (VERIFIED in policies)
    for variant in (FULL, LINEAR):  # which take turns by their time
        assert _of(variant, pieces) == _of(variant, stages)
    for run in pieces:
        assert run.seconds > run.gate_seconds >= 0
        assert (run.gate_seconds > 0) == (run.gated > 0)


def _of(variant: Variant, runs: list[StageRun]) -> list[tuple[range, int, int, int]]:
    return [(run.stages, run.rows, run.tokens, run.gated) for run in runs if run.variant == variant]


@pytest.mark.parametrize("exits", [OFF, LEAVE, BACKFILL, VERIFIED], ids=lambda exits: exits.mode)
def test_every_tick_of_answers_is_whole_where_all_stages_run(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, exits: ExitPolicy
) -> None:
    whole = Whole(monkeypatch, allowed=True)
    with running(tiny_model, new_drafter=lambda _: FixedDrafter(0.4, 2)) as bench:
        bench.answer(prompt=tuple(range(200)), exits=exits, max_new_tokens=20)
    assert whole.whole == whole.ticks > 2


def test_a_drafted_end_is_confirmed_for_as_many_blocks(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing may follow it: what waits goes on alone. Texts may end at many tokens, so that exits often draft one."""
    model = replace(tiny_model, spec=replace(tiny_model.spec, eos_token_ids=tuple(range(0, 256, 6))))
    told = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            Whole(patch, allowed=allowed)
            with running(model, new_drafter=lambda _: FixedDrafter(0.0, 4)) as bench:
                with bench.held():
                    asked = [
                        bench.ask(exits=VERIFIED, temperature=1.0, seed=i, ignore_eos=False) for i in range(6)
                    ]
                told.append([(one.ids(), one.finish.summary.depth) for one in [one.wait() for one in asked]])
    assert told[0] == told[1]


def test_a_text_that_is_scored_goes_by_stages(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(monkeypatch, allowed=True)
    with running(tiny_model) as bench:
        score(bench, tuple(range(40)), OFF)
    assert whole.ticks > 0
    assert whole.whole == 0


def test_exits_that_are_replayed_go_by_stages(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for allowed in (True, False):
        with monkeypatch.context() as patch:
            whole = Whole(patch, allowed=allowed)
            with running(tiny_model, pages=9) as bench:
                with bench.held():
                    asked = [bench.ask(exits=LEAVE, max_new_tokens=60) for _ in range(2)]
                answers.append([answer_of(one.wait()) for one in asked])
                preempted = bench.value("exeunt_preemptions_total")
        assert preempted > 0
        assert (0 < whole.whole < whole.ticks) == allowed
    assert answers[0] == answers[1]


CHANGED: list[dict[str, Any]] = [
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 9, "ignore_eos": False},
]
PLAIN: list[dict[str, Any]] = [{}, {"temperature": 0.8}, {"temperature": 1e-6, "top_k": 3}, {"top_p": 0.5}]


@pytest.mark.parametrize("asked", [PLAIN, CHANGED, PLAIN + CHANGED], ids=["plain", "changed", "both"])
def test_draws_are_the_passs_own_unless_one_changes_logits_first(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    beside = [0]

    def started(*given: Any) -> Any:
        beside[0] += 1
        return start_each(*given)

    monkeypatch.setattr("exeunt.server.runner.start_each", started)
    with running(tiny_model) as bench:
        with bench.held():
            heard = [bench.ask(seed=4, **each) for each in asked]
        together = [answer_of(one.wait()) for one in heard]
        assert (beside[0] > 0) == (asked is not PLAIN)
        alone = [answer_of(bench.answer(seed=4, **each)) for each in asked]
    go_by_stages(monkeypatch)
    with running(tiny_model) as bench:
        staged = [answer_of(bench.answer(seed=4, **each)) for each in asked]
    assert alone == together == staged


def test_a_draw_that_cannot_be_described_is_its_own_requests_trouble(tiny_model: LoadedModel) -> None:
    with running(tiny_model) as bench:
        clean = bench.answer().ids()
        with bench.held():
            asked = [bench.ask(), bench.ask(temperature=10**400), bench.ask()]
        first, failed, last = [one.wait() for one in asked]
    assert first.ids() == last.ids() == clean
    assert isinstance(failed.events[-1], FailureEvent)


def test_where_no_threshold_is_certified_nothing_is_asked_on_the_way(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = ExitPolicy("approximate", threshold=None, target=0.01)
    with monkeypatch.context() as patch:
        Whole(patch, allowed=False)
        wanted, counts, stages = _spoken(tiny_model, [never, never])
    found, counted, pieces = _spoken(tiny_model, [never, never])
    assert [answer_of(one) for one in found] == [answer_of(one) for one in wanted]
    assert counted == counts
    for variant in (FULL, LINEAR):
        assert _of(variant, pieces) == _of(variant, stages)
    assert {run.stages for run in pieces} == {range(3)}


def test_an_audit_that_fails_costs_audits_and_no_answer(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [LEAVE, BACKFILL, LEAVE]
    wanted, _, _ = _spoken(tiny_model, policies)

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Auditor, "_hold_or_pick", fails)
    found, counted, _ = _spoken(tiny_model, policies, audit_share=1.0)
    assert [answer_of(one) for one in found] == [answer_of(one) for one in wanted]
    assert counted["audited_tokens"] == 0


def test_steps_go_by_stages_where_rows_wait_at_exits(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Whole(monkeypatch, allowed=True)
    with running(tiny_model, run_through=False) as bench:
        bench.answer(exits=LEAVE, max_new_tokens=20)
        assert whole.whole <= 2  # a last token of a prompt asks no gate
        bench.answer(exits=OFF, max_new_tokens=20)
    assert whole.whole > 15


def test_only_certified_exits_are_asked(tiny_model: LoadedModel) -> None:
    plan = StagePlan(6, (1, 3), certified=(1,), drafting=0)
    passes = WholePasses(tiny_model, plan, lambda *_: RowSampling(SamplingParams(), 0, 0))
    assert passes._asked == {"off": 0, "approximate": 0b10, "verified": 0b01}
