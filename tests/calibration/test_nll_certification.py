"""What is certified of the NLL increase is what tokens cost: backfilled, propagated, remembered, left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exeunt.calibration.certificates import (
    CertifiedVariant,
    NllEffort,
    _untested_reason,
    certify_variants,
    certify_work,
    nll_risk_table,
)
from exeunt.calibration.certification import (
    certify_both_propagated,
    certify_nll_backfilled,
    full_depth_pass,
)
from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.model_stack import ModelStack
from exeunt.calibration.nll_planning import plan_nll, select_losses
from exeunt.calibration.nll_risk import CLIP, NllCounts, forecast_bound
from exeunt.calibration.risk import LEAST_BLOCKS
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import (
    GateView,
    NllPlan,
    Steps,
    ThresholdPlan,
    threshold_at,
    view_gates,
)
from exeunt.calibration.token_losses import TokenLosses
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import Variant
from tests.calibration.conftest import VOCAB, random_exit

STEPS = Steps((0.6, 0.55, 0.5), {2.9: 0.6})
PLAN = ThresholdPlan((0.6, 0.5), {0.9999: 0.6}, 0.01, NllPlan(STEPS, Steps((0.6, 0.55), {2.9: 0.6})))


def rows(count: int = 30) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randint(VOCAB, (40,), generator=g) for _ in range(count)]


def forced(decoder: Decoder) -> ForcedModel:
    return ForcedModel(decoder, "full", (random_exit(0, 1), random_exit(2, 2)))


def with_backfill(
    model: ForcedModel,
    batch: SequenceBatch,
    threshold: float,
    states: Sequence[torch.Tensor],
    final: torch.Tensor,
    sink: Any,
) -> None:
    """A pass in which a token that leaves changes no later one: every gate is asked about full depth's states."""
    kept = torch.arange(batch.tokens)
    for number, (head, hidden) in enumerate(zip(model.exits, states, strict=True)):
        thresholds = torch.full((len(kept),), threshold)
        thresholds[batch.positions[kept] == 0] = torch.inf
        gate = head.gate(hidden[kept], thresholds, model.decoder.project_exit)
        sink(number, kept[gate.leaves], gate.logits)
        kept = kept[~gate.leaves]
    model.final(final[kept], kept, sink)


def losses_of(
    model: ForcedModel, row: torch.Tensor, threshold: float, *, propagate: bool
) -> NDArray[np.float64]:
    """By token: its NLL in the mode, at full depth, and whether it left, from the logits that a pass hands out."""
    (batch,) = batches([row], 1000)
    states, final = model.full_depth_at_exits(batch)
    found = np.zeros((3, len(row)))

    def sink(place: int) -> Any:
        def note(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
            for token, line in zip(tokens.tolist(), logits.log_softmax(-1), strict=True):
                if token + 1 < len(row):
                    found[place, token] = -float(line[row[token + 1]])
                if place == 0:
                    found[2, token] = number < len(model.exits)

        return note

    model.final(final, torch.arange(len(row)), sink(1))
    if propagate:
        model.with_exits(batch, threshold, states[0], sink(0))
    else:
        with_backfill(model, batch, threshold, states, final, sink(0))
    return found


@pytest.mark.parametrize("propagate", [False, True])
def test_increases_are_those_of_a_plain_pass(decoder: Decoder, propagate: bool) -> None:
    model, some = forced(decoder), rows(25)
    full_depth = full_depth_pass(model, some, 0.5, batch_tokens=130)
    if propagate:
        _, outcome = certify_both_propagated(model, full_depth, None, STEPS)
    else:
        outcome = certify_nll_backfilled(full_depth, STEPS)
    assert [threshold for threshold, _ in outcome.tested] == [0.6, 0.55, 0.5]
    for threshold, counts in outcome.tested:
        for place, row in enumerate(some):
            mode, full, left = losses_of(model, row, threshold, propagate=propagate)
            scored = slice(1, len(row) - 1)  # the first token may not leave, and nothing follows the last
            increase = (mode - full)[scored]
            assert counts.clipped[place] == pytest.approx(increase.clip(-CLIP, CLIP).sum(), abs=1e-3)
            assert counts.unclipped[place] == pytest.approx(increase.sum(), abs=1e-3)
            assert counts.full[place] == pytest.approx(full[scored].sum(), abs=1e-3)
            assert counts.exits[place] == left[scored].sum()
            assert counts.tokens[place] == len(row) - 2
    assert any(abs(counts.clipped - counts.unclipped).max() > 0.1 for _, counts in outcome.tested)


def test_both_risks_share_passes(decoder: Decoder) -> None:
    """Four thresholds of two plans are three passes; what each sequence is told is what it would be told alone."""
    model = forced(decoder)
    full_depth = full_depth_pass(model, rows(), 0.5, batch_tokens=200)
    plan = ThresholdPlan((0.6, 0.5), {0.9999: 0.6}, 0.01)
    steps = Steps((0.6, 0.55), {2.9: 0.6})
    told: list[int] = []
    both = certify_both_propagated(model, full_depth, plan, steps, advance=told.append)
    assert sum(told) == 3 * 1200
    alone, _ = certify_both_propagated(model, full_depth, plan, None)
    assert both[0].certificates == alone.certificates
    assert both[0].by_exit == alone.by_exit
    _, increase = certify_both_propagated(model, full_depth, None, steps)
    assert both[1].certificates == increase.certificates


def test_a_pass_may_read_a_part_of_the_batches(decoder: Decoder) -> None:
    model = forced(decoder)
    full_depth = full_depth_pass(model, rows(), 0.5, batch_tokens=200)  # six batches of five rows
    steps = Steps((0.55,), {2.9: 0.55})
    _, whole = certify_both_propagated(model, full_depth, None, steps)
    _, part = certify_both_propagated(model, full_depth, None, steps, every=2)
    ((_, all_counts),), ((_, counts),) = whole.tested, part.tested
    read = np.repeat([True, False] * 3, 5)
    assert counts.tokens.tolist() == [38.0 if each else 0.0 for each in read]
    assert counts.clipped[read] == pytest.approx(all_counts.clipped[read])
    assert (counts.clipped[~read] == 0).all()


def test_a_pass_without_losses_certifies_no_nll(decoder: Decoder) -> None:
    full_depth = full_depth_pass(forced(decoder), rows(), 0.5, batch_tokens=400, losses=False)
    with pytest.raises(ValueError, match="measured no losses"):
        certify_nll_backfilled(full_depth, STEPS)


class MemoryJournal:
    """Remembers in memory; `lose` forgets entries again."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[dict[str, torch.Tensor], Any]] = {}
        self.written: list[str] = []

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        return self.held.get(name)

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], record: Any) -> None:
        self.written.append(name)
        self.held[name] = (dict(tensors), record)


@pytest.fixture(scope="module")
def stack(checkpoint: Path) -> ModelStack:
    return ModelStack.build(open_checkpoint(checkpoint), None, "int4", torch.device("cpu"), torch.float32)


def certified(stack: ModelStack, exits: Sequence[ExitHead], **options: Any) -> tuple[CertifiedVariant, ...]:
    given = {"batch_tokens": 200, "confidence": 0.95, "advance": lambda _tokens: None, **options}
    return certify_variants(stack, exits, rows(50), PLAN, **given)


EXITS = (random_exit(0, 1), random_exit(2, 2))


def test_every_combination_has_both_risks_and_says_what_was_not_tested(stack: ModelStack) -> None:
    told: list[int] = []
    found = certified(stack, EXITS, advance=told.append)
    assert [(each.variant, each.skipped_kv) for each in found] == [
        (variant, method) for variant in stack.variants for method in ("backfill", "propagate")
    ]
    deployed, other = found[1], found[3]
    assert (deployed.variant, other.variant) == (stack.deployed, Variant("full", "full", False))
    assert deployed.nll is not None
    assert other.nll is not None
    assert deployed.nll.tested
    assert other.nll.tested == ()
    assert other.nll.certificates[0].reason == (
        "it was tested only for full weights with INT4 keys and values, ask for that or calibrate with --preset "
        "thorough"
    )
    assert sum(told) <= certify_work(stack, EXITS, rows(50), PLAN)
    table = nll_risk_table(found, 0.95)
    assert [(entry.skipped_kv, entry.text_blocks) for entry in table] == [
        ("backfill", 50),
        ("propagate", 25),  # every second batch
        ("backfill", 25),  # every second row
        ("propagate", 0),
    ]
    assert not any(line.certified for line in table[3].targets)
    every = certified(stack, EXITS, effort=NllEffort("all", 1))
    assert all(each.nll is not None and each.nll.tested for each in every)
    assert nll_risk_table(every, 0.95)[1].text_blocks == 50
    none = certified(stack, EXITS, effort=NllEffort("none"))
    assert [bool(each.nll and each.nll.tested) for each in none] == [True, False, True, False]
    reasons = [each.nll.certificates[0].reason for each in none[1::2] if each.nll is not None]
    assert reasons == [  # the default preset tests the deployed variant, the first of these, and no other
        "the bundle's preset does not test it, calibrate with --preset default",
        "the bundle's preset does not test it, calibrate with --preset thorough",
    ]


def test_behind_one_exit_propagate_costs_what_backfill_does_not(stack: ModelStack) -> None:
    """Who leaves is the same, what the tokens that stay attend to is not."""
    found = certified(stack, EXITS[:1], effort=NllEffort("all", 1))
    backfill, propagate = found[0], found[1]
    assert backfill.certification == propagate.certification
    assert backfill.nll is not None
    assert propagate.nll is not None
    kept, changed = dict(backfill.nll.tested)[0.55], dict(propagate.nll.tested)[0.55]
    assert kept.exits.tolist() == changed.exits.tolist()
    assert kept.full.tolist() == changed.full.tolist()
    assert abs(kept.unclipped - changed.unclipped).max() > 1e-3


def test_finished_variants_are_taken_from_the_journal(stack: ModelStack) -> None:
    journal = MemoryJournal()
    first = certified(stack, EXITS, journal=journal)
    assert journal.written == ["certified-full-int4-whole", "certified-full-full-whole"]
    del journal.held["certified-full-full-whole"]  # interrupted before the second
    told: list[int] = []
    again = certified(stack, EXITS, journal=journal, advance=told.append)
    assert journal.written[2:] == ["certified-full-full-whole"]
    assert sum(told) <= certify_work(stack, EXITS, rows(50), PLAN)
    for before, after in zip(first, again, strict=True):
        assert before.entry(0.95) == after.entry(0.95)
        assert before.nll_entry(0.95) == after.nll_entry(0.95)
        assert before.certification.by_exit == after.certification.by_exit
        for (threshold, one), (same, other) in zip(
            before.certification.tested, after.certification.tested, strict=True
        ):
            assert threshold == same
            assert (one.exits == other.exits).all()
            assert (one.errors == other.errors).all()
            assert one.tokens == other.tokens
        assert before.nll is not None
        assert after.nll is not None
        assert before.nll.certificates == after.nll.certificates
        for (_, sums), (_, same_sums) in zip(before.nll.tested, after.nll.tested, strict=True):
            assert sums.clipped.tobytes() == same_sums.clipped.tobytes()


def test_what_was_certified_otherwise_is_certified_again(stack: ModelStack) -> None:
    journal = MemoryJournal()
    certified(stack, EXITS, journal=journal)
    certified(stack, EXITS, journal=journal, confidence=0.9)
    assert len(journal.written) == 4
    certified(stack, EXITS[:1], journal=journal, confidence=0.9)
    assert len(journal.written) == 6


def planted(tokens: int = 20_000, blocks: int = 100) -> tuple[GateView, TokenLosses]:
    """One exit at which a token of reach r costs 0.4 (1 - r) nats on average: at share s the increase is 0.2 s²."""
    g = np.random.default_rng(3)
    reach = g.random((1, tokens))
    full = np.full(tokens, 2.0)
    cost = g.exponential(0.4 * (1.0 - reach))
    view = GateView(
        reach, reach, reach, np.ones((1, tokens), dtype=bool), np.arange(tokens) * blocks // tokens, blocks
    )
    return view, TokenLosses(full + cost, full, np.ones(tokens, dtype=bool))


def test_the_plan_stands_where_the_increase_is_known_to_be_safe() -> None:
    view, losses = planted()
    targets = (0.005, 0.01, 0.02)
    plan = plan_nll(view, losses, targets, certify_tokens=40_000)
    assert plan is not None
    assert list(plan.backfill.thresholds) == sorted(plan.backfill.thresholds, reverse=True)
    assert len(plan.propagate.thresholds) <= 2 * len(targets)
    for target in targets:
        share = (target / 0.2) ** 0.5  # at which the increase is the target
        tried = [1.0 - threshold for threshold in plan.backfill.thresholds]
        assert any(0.75 * share < each < share for each in tried)
        for steps in (plan.backfill, plan.propagate):
            begin = 1.0 - steps.begins[target]
            assert 0.3 * share < begin < 0.6 * share
            assert steps.begins[target] in steps.thresholds


def test_the_plan_takes_thresholds_that_are_passes_anyway() -> None:
    view, losses = planted()
    plain = plan_nll(view, losses, (0.01,), certify_tokens=40_000)
    assert plain is not None
    near = plain.propagate.thresholds[0] + 0.002
    plan = plan_nll(view, losses, (0.01,), certify_tokens=40_000, beside=(0.999, near, 0.2))
    assert plan is not None
    assert plan.propagate.thresholds[0] == near
    assert plan.propagate.begins == {0.01: near}
    assert plan.backfill == plain.backfill
    assert plan_nll(view, losses, (), certify_tokens=40_000) is None


@pytest.mark.parametrize("every", [1, 2])
def test_no_sequence_begins_where_too_few_blocks_have_an_exit(every: int) -> None:
    """A gate is sure in a sixth of the documents alone: at half the safe share only these have an exit."""
    view, losses = planted(blocks=100)
    sure = np.where(view.text_block % 6 == 0, 1.0, 0.4)
    view = replace(view, reach=view.reach * sure)
    plan = plan_nll(view, losses, (0.02,), certify_tokens=20_000, every=every)
    assert plan is not None
    for steps, part in ((plan.backfill, 1), (plan.propagate, every)):
        exits = view.counts(steps.begins[0.02]).exits
        assert int((exits > 0).sum()) >= 1.4 * LEAST_BLOCKS * part
    loosest = view.counts(plan.backfill.thresholds[-1]).exit_rate
    half = threshold_at(view.best, 0.5 * loosest / 1.1)
    assert int((view.counts(half).exits > 0).sum()) < LEAST_BLOCKS, "where it would have begun"


def test_a_plan_for_what_cannot_be_reached_still_begins_somewhere() -> None:
    view, losses = planted(tokens=300, blocks=15)  # too few blocks for any bound
    plan = plan_nll(view, losses, (0.01,), certify_tokens=300)
    assert plan is not None
    assert plan.backfill.begins[0.01] in plan.backfill.thresholds
    seen = losses.counts(losses.full, np.ones(300, dtype=bool), view.text_block, view.blocks)
    assert forecast_bound(seen, 1.0) is None
    assert isinstance(seen, NllCounts)


def test_losses_of_the_select_split_are_those_of_a_pass(decoder: Decoder) -> None:
    model, some = forced(decoder), rows(20)
    full_depth = full_depth_pass(model, some, 0.0, batch_tokens=2000)
    assert full_depth.losses is not None
    (batch,) = batches(some, 2000)
    states, final = model.full_depth_at_exits(batch)
    labelled = [Labelled(hidden, full_depth.tops[0]) for hidden in states]
    view = view_gates(model.exits, labelled, some, decoder.project_exit)
    losses = select_losses(model, model.exits, labelled, final, some, view)
    assert losses.full == pytest.approx(full_depth.losses.full, abs=1e-5)
    assert (losses.scored == full_depth.losses.scored).all()
    known = losses.at_exits != 0
    assert known.mean() > 0.2
    assert losses.at_exits[known] == pytest.approx(full_depth.losses.at_exits[known], abs=1e-5)


@pytest.mark.parametrize(
    ("index", "exits"), [(1, EXITS), (0, EXITS), (2, (random_exit(0, 1), random_exit(1, 2))), (2, EXITS[1:])]
)
def test_a_variant_with_the_linear_block_goes_on_from_where_its_twin_parts(
    index: int, exits: Sequence[ExitHead], stack: ModelStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what a pass through all blocks says."""
    hidden, g = stack.full.spec.hidden_size, torch.Generator().manual_seed(3)
    down, up, bias = (torch.randn(shape, generator=g) / 4 for shape in ((3, hidden), (hidden, 3), (hidden,)))
    both = stack.with_linear_block(LinearBlock(index, down, up, bias))
    starts: list[int] = []
    run = ForcedModel.states_at

    def noted(model: ForcedModel, batch: SequenceBatch, depths: Sequence[int], *rest: Any) -> Any:
        starts.append(rest[0] if rest else 0)
        return run(model, batch, depths, *rest)

    monkeypatch.setattr(ForcedModel, "states_at", noted)
    shared = certified(both, exits, effort=NllEffort("all", 1))
    assert starts.count(index) >= len(both.variants) // 2
    monkeypatch.setattr("exeunt.calibration.certification._front_of", lambda *_: None)
    whole = certified(both, exits, effort=NllEffort("all", 1))
    assert [_figures(each) for each in shared] == [_figures(each) for each in whole]


def _figures(each: CertifiedVariant) -> tuple[Any, ...]:
    """All that was found of a combination, as values that compare."""
    nll = each.nll
    assert nll is not None
    assert nll.tested
    return (
        (each.variant, each.skipped_kv, each.certification.certificates, each.certification.by_exit),
        [(at, counts.exits.tolist(), counts.errors.tolist()) for at, counts in each.certification.tested],
        (nll.certificates, [(at, counts.clipped.tolist()) for at, counts in nll.tested]),
    )


def test_what_was_tested_is_told_by_what_differs() -> None:
    deployed, effort = Variant("int4", "int4", False), NllEffort(variants="deployed")
    told = [
        _untested_reason(effort, variant, deployed)
        for variant in (
            Variant("full", "int4", False),
            Variant("int4", "int4", True),
            Variant("full", "int4", True),
        )
    ]
    words = "it was tested only for INT4 weights with INT4 keys and values"
    assert [each.partition(", ask for that")[0] for each in told] == [
        words,
        f"{words} without the linear block",
        f"{words} without the linear block",
    ]
