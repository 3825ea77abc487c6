"""What the GPU check makes of answers with exits: which differ, which say nothing, and what it has a model draft."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exeunt.deploy.bench_load import Load, Trace
from exeunt.server.drafting import LOOKUP
from exeunt.server.request import ExitPolicy
from scripts.gpu_check import end_to_end, exit_answers
from scripts.gpu_check.counted_ticks import Ticks, counted_ticks
from scripts.gpu_check.engine_speeds import HALF, INT4, VERIFIED, engine_driver
from scripts.gpu_check.exit_answers import AHEAD, IN_TURN, Drafting
from scripts.gpu_check.models import TOY
from scripts.gpu_check.report import Context
from scripts.gpu_check.sizes import Sizes
from tests.scripts.toy_gpu_check import toy_context


def _trace(ids: Sequence[int], depths: Sequence[int]) -> Trace:
    return Trace(0.0, blocks=4, ids=[*ids], token_depths=[*depths])


def _checked(context: Context, ours: Trace, *, also: Sequence[Trace] = ()) -> list[dict[str, Any]]:
    wanted = _trace([1, 2, 3], [4, 2, 4])
    exit_answers._same(context, "engine", {"load": [*also, ours]}, {"load": [*also, wanted]})
    return list(context.report.data["checks"])


@pytest.mark.parametrize(
    ("ids", "depths", "apart"),
    [
        ([1, 2, 3], [4, 2, 4], None),
        ([1, 2, 4], [4, 2, 4], [1, 2]),
        ([1, 2, 3], [4, 4, 2], [1, 1]),  # as many left, but others
        ([1, 2], [4, 2], [1, 2]),
    ],
)
def test_a_token_or_an_exit_that_differs_fails_the_check(
    tmp_path: Path, ids: list[int], depths: list[int], apart: list[int] | None
) -> None:
    same, some = _checked(toy_context(tmp_path), _trace(ids, depths), also=[_trace([7], [4])])
    assert (same["good"], same["first_apart"]) == (apart is None, apart)
    assert some["good"]
    assert some["left"] == sum(depth < 4 for depth in depths)


@pytest.mark.parametrize("depth", [2, 4])
def test_answers_that_all_left_or_all_stayed_show_nothing(tmp_path: Path, depth: int) -> None:
    context, answers = toy_context(tmp_path), {"load": [_trace([1, 2], [depth] * 2)]}
    exit_answers._same(context, "engine", answers, answers)
    assert [one["good"] for one in context.report.data["checks"]] == [True, False]


@pytest.mark.parametrize("other", [0, 1])
def test_verified_answers_must_be_those_of_exits_off(tmp_path: Path, other: int) -> None:
    class Driver:
        def run(self, prompts: Any, variant: Any, exits: ExitPolicy, load: Load) -> list[Trace]:
            verified, drawn = exits.mode == "verified", load.temperature > 0
            last = 2 + other * verified * drawn
            return [Trace(0.0, blocks=4, ids=[1, last], token_depths=[4, 2 if verified else 4], drafts=1)]

    context, driver = toy_context(tmp_path), Driver()
    exit_answers._verified(context, "engine", driver, INT4, [[1]], exit_answers.QUICK_SIZES)  # type: ignore[arg-type]
    assert [one["good"] for one in context.report.data["checks"]] == [True, not other]


@pytest.mark.parametrize(
    ("stages", "good"), [([0, LOOKUP], True), ([0], False), ([LOOKUP], False), ([], False)]
)
def test_answers_of_which_nothing_was_drafted_show_nothing(
    tmp_path: Path, stages: list[int], good: bool
) -> None:
    context, drafters = toy_context(tmp_path), [Drafting(), Drafting()]
    drafters[1].settled(stages, 0)
    exit_answers._had_drafts(context, "engine", drafters)
    assert [one["good"] for one in context.report.data["checks"]] == [good]


def test_a_way_that_was_not_taken_fails_the_check(tmp_path: Path) -> None:
    context = toy_context(tmp_path)
    for ticks in (Ticks(5, 3), Ticks(5, 0), Ticks(0, 3)):
        for engine in (AHEAD, IN_TURN):
            exit_answers._device_decided(context, "engine", ticks, engine)
    good = [one["good"] for one in context.report.data["checks"]]
    assert good == [True, True, False, True, False, False]


def test_what_the_time_does_not_suffice_for_is_named_behind_the_first_variant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def answers(context: Context, name: str, *given: Any) -> exit_answers.Answers:
        seen.append(name)
        return {"load": [_trace([1, 2], [4, 2])]}

    model = SimpleNamespace(variants=exit_answers.VARIANTS)
    monkeypatch.setattr(exit_answers, "model_with_exits", lambda context, found: model)
    monkeypatch.setattr(exit_answers, "_of_engine", answers)
    context, found = replace(toy_context(tmp_path, -1.0), quick=False), dict[str, Any]()
    exit_answers.run(context, found)
    ways = ["without graphs", "in graphs", "in graphs, steps in turn"]
    assert seen == [f"engine int4/int4 {way}" for way in ways]
    assert found["skipped"] == [f"engine full/full {way}: no time left" for way in ways]
    assert len(context.report.data["checks"]) == 4


def test_a_bundles_own_exits_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context, found = toy_context(tmp_path), dict[str, Any]()
    bundle = end_to_end.random_model(context, {}, TOY, rate=None)
    monkeypatch.setattr(exit_answers, "packaged_model", lambda context: bundle)
    assert exit_answers.model_with_exits(context, found) is bundle
    assert found == {"gates": "calibrated"}


def test_exits_at_which_none_may_leave_are_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    context, found = toy_context(tmp_path), dict[str, Any]()
    bundle = end_to_end.random_model(context, {}, TOY, rate=None)
    assert bundle is not None
    record = SimpleNamespace(block=bundle.exits[0].block, certified=False, drafting=True)
    manifest: Any = SimpleNamespace(exits=[record])
    apart = replace(bundle, manifest=manifest)
    monkeypatch.setattr(exit_answers, "packaged_model", lambda context: apart)
    model = exit_answers.model_with_exits(context, found, rate=None)
    assert found["gates"].startswith("synthetic, after block ")
    assert (apart.certified_exits, model.certified_exits) == ((), (0,))


@pytest.mark.usefixtures("one_thread")
def test_an_engine_asks_the_drafter_that_it_is_given_and_its_ticks_are_counted(tmp_path: Path) -> None:
    model = end_to_end.random_model(toy_context(tmp_path), {}, TOY, rate=0.5)
    assert model is not None
    sizes = Sizes((2,), 12, 9)
    asked: list[Drafting] = []

    def new_drafter(request: object) -> Drafting:
        asked.append(Drafting())
        return asked[-1]

    driver = engine_driver(model, sizes.load(2), cuda_graphs=False, new_drafter=new_drafter)
    try:
        prompts = driver.prompts(2, sizes.prompt)
        with counted_ticks() as ticks:
            verified = driver.run(prompts, INT4, VERIFIED, sizes.load(2))
            halved = driver.run(prompts, INT4, HALF, sizes.load(2))
    finally:
        driver.close()
    assert len(asked) == 2
    assert sum(trace.drafts for trace in verified) > 0
    assert (ticks.on_device, ticks.begun_ahead) == (0, 0)  # a CPU has no graphs
    for trace in (*verified, *halved):
        assert len(trace.token_depths) == len(trace.ids) == 9
        assert sum(trace.token_depths) == trace.depths


def test_drafts_take_turns() -> None:
    drafter = Drafting()
    proposals = [drafter.propose(range(count), 0, 1) for count in (3, 4, 5)]
    assert [each.threshold for each in proposals] == [0.5, None, None]
    assert [each.tokens for each in proposals] == [(), (2,), ()]  # of two as many as there is room for
    assert [drafter.at_stake(range(count), 0, 1) for count in (3, 4, 5)] == [float("inf"), float("inf"), 0.0]
