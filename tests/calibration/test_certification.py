"""Certificates count what really leaves: by passes with exits where it is propagated, at full depth with backfill."""

import numpy as np
import pytest
import torch

from exeunt.calibration.certification import (
    Certification,
    FullDepthPass,
    certify_backfilled,
    certify_both_propagated,
    full_depth_pass,
)
from exeunt.calibration.risk import upper_bound
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.text_units import text_units
from exeunt.calibration.thresholds import GateView, ThresholdPlan, plan_thresholds
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.compression.variant import KVFormat
from tests.calibration.conftest import BLOCKS, VOCAB, random_exit
from tests.compression.paged_generation import batch_of, sequential_pages

PLAN = ThresholdPlan((0.6, 0.55, 0.5), {0.9999: 0.6, 0.9998: 0.55}, 0.01)


def rows(count: int = 30) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randint(VOCAB, (40,), generator=g) for _ in range(count)]


def forced(decoder: Decoder, kv: KVFormat = "full") -> ForcedModel:
    return ForcedModel(decoder, kv, (random_exit(0, 1), random_exit(2, 2)))


def test_propagated_ones_count_what_left_and_differed(decoder: Decoder) -> None:
    model = forced(decoder)
    plan = plan_thresholds(_plan_view(model, rows()), (0.9999,), certify_tokens=1200)
    told: list[int] = []
    full_depth = full_depth_pass(model, rows(), 0.0, batch_tokens=200, advance=told.append)
    outcome, _ = certify_both_propagated(model, full_depth, plan, None, advance=told.append)
    threshold, counts = outcome.tested[0]
    left = wrong = 0
    for batch in batches(rows(), 10_000):
        entry, final = model.full_depth(batch)
        top = model.top_tokens(final)
        seen: list[tuple[int, int]] = []

        def sink(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
            if number < 2:
                seen.append((len(tokens), int((logits.argmax(-1) != top[tokens]).sum())))  # noqa: B023

        model.with_exits(batch, threshold, entry, sink)
        left, wrong = left + sum(n for n, _ in seen), wrong + sum(w for _, w in seen)
    assert (counts.total, counts.wrong) == (left, wrong)
    assert 0 < wrong <= left
    assert counts.tokens == 1200 - len(rows())  # all but each row's first
    assert sum(dict(outcome.by_exit)[threshold]) == left
    assert sum(told) == 1200 * (1 + len(outcome.tested))


@torch.inference_mode()
def left_alone(model: ForcedModel, row: torch.Tensor, threshold: float) -> list[tuple[int, bool]]:
    """Token by token: the exit where each would leave, and whether its token is another than full depth's.

    Every token goes to the end in any case, which is what backfill makes of it.
    """
    decoder = model.decoder
    pages: KVPages
    pages, tables = sequential_pages(model.layout, 1, len(row), decoder.device)
    found = []
    for position in range(len(row)):
        batch = batch_of([range(position, position + 1)], tables, model.layout.page_tokens)
        hidden, start, exit_number, said = (
            decoder.embed(row[position : position + 1], batch.positions),
            0,
            -1,
            -1,
        )
        for number, head in enumerate(model.exits):
            hidden = decoder.run_blocks(hidden, batch, pages, start, head.depth)
            start = head.depth
            limit = torch.tensor([threshold if position > 0 else float("inf")])
            gate = head.gate(hidden, limit, decoder.project_exit)
            if exit_number < 0 and bool(gate.leaves):
                exit_number, said = number, int(gate.logits.argmax())
        hidden = decoder.run_blocks(hidden, batch, pages, start, BLOCKS)
        found.append((exit_number, said != int(decoder.head(hidden).argmax())))
    return found


@pytest.mark.parametrize("kv", ["full", "int4"])
def test_backfilled_ones_agree_with_a_count_token_by_token(decoder: Decoder, kv: KVFormat) -> None:
    model, some = forced(decoder, kv), rows(6)
    for threshold in PLAN.thresholds:
        found = [left_alone(model, row, threshold) for row in some]
        exits = [sum(number >= 0 for number, _ in row) for row in found]
        errors = [sum(number >= 0 and wrong for number, wrong in row) for row in found]
        alone = ThresholdPlan((threshold,), {0.9: threshold}, 0.01)
        ((_, counts),) = (
            one := certify_backfilled(full_depth_pass(model, some, threshold, batch_tokens=100), alone)
        ).tested
        assert counts.exits.tolist() == exits
        assert counts.errors.tolist() == errors
        assert counts.tokens == sum(map(len, some)) - len(some)
        by_exit = [sum(number == place for row in found for number, _ in row) for place in (0, 1)]
        assert one.by_exit == ((threshold, tuple(by_exit)),)
        assert min(by_exit) > 0


def test_backfill_needs_no_pass_per_threshold(decoder: Decoder) -> None:
    model = forced(decoder)
    full_depth = full_depth_pass(model, rows(), 0.5, batch_tokens=400)
    before = decoder.block_calls.tokens[0]
    outcome = certify_backfilled(full_depth, PLAN)
    assert decoder.block_calls.tokens[0] == before
    assert len(outcome.tested) == 3


@pytest.mark.parametrize("kv", ["full", "int4"])
def test_behind_one_exit_both_methods_leave_alike(decoder: Decoder, kv: KVFormat) -> None:
    """What is skipped lies behind the only exit, so nothing that decides about leaving ever sees it."""
    model = ForcedModel(decoder, kv, (random_exit(1, 2),))
    full_depth = full_depth_pass(model, rows(), min(PLAN.thresholds), batch_tokens=200)
    backfilled = certify_backfilled(full_depth, PLAN)
    propagated, _ = certify_both_propagated(model, full_depth, PLAN, None)
    assert backfilled.certificates == propagated.certificates
    assert backfilled.by_exit == propagated.by_exit


def test_behind_two_exits_they_differ(decoder: Decoder) -> None:
    model = forced(decoder)
    full_depth = full_depth_pass(model, rows(), min(PLAN.thresholds), batch_tokens=200)
    backfilled = certify_backfilled(full_depth, PLAN)
    propagated, _ = certify_both_propagated(model, full_depth, PLAN, None)
    assert backfilled.by_exit != propagated.by_exit
    assert [split[0] for _, split in backfilled.by_exit] == [split[0] for _, split in propagated.by_exit]


def certified(share_wrong: float, target: float) -> Certification:
    """What is certified of 40,000 tokens of which half are sure to leave, a share of them wrongly."""
    g = np.random.default_rng(2)
    tokens, blocks = 40_000, 160
    reach = np.where(g.random((1, tokens)) < 0.5, 0.9, 0.1)
    view = GateView(
        reach,
        reach,
        reach,
        g.random((1, tokens)) >= share_wrong,
        np.repeat(np.arange(blocks), tokens // blocks),
        blocks,
    )
    full_depth = FullDepthPass((), (), (), view)
    return certify_backfilled(full_depth, ThresholdPlan((0.8,), {target: 0.8}, 0.001))


@pytest.mark.parametrize(("share_wrong", "safe"), [(0.03, True), (0.05, False), (0.08, False)])
def test_a_target_is_certified_only_where_the_bound_keeps_it(share_wrong: float, safe: bool) -> None:
    outcome = certified(share_wrong, 0.05)
    (certificate,) = outcome.certificates
    assert certificate.certified is safe
    assert certificate.exits == pytest.approx(20_000, rel=0.05)
    assert certificate.disagreement == pytest.approx(share_wrong, rel=0.1)
    assert certificate.upper_bound == upper_bound(outcome.tested[0][1], 0.001)
    assert safe or "may be as high as" in (certificate.reason or "")


def _plan_view(model: ForcedModel, rows: list[torch.Tensor]) -> GateView:
    tokens = sum(map(len, rows))
    g = np.random.default_rng(0)
    return GateView(
        g.random((2, tokens)) * 0.8,
        np.ones((2, tokens)),
        np.ones((2, tokens)),
        np.ones((2, tokens), dtype=bool),
        text_units(rows).where,
        len(rows),
    )
