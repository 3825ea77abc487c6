"""The figures of the table are those of a plain computation over the same tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from exeunt.calibration.evaluation import Mode, evaluate_modes
from exeunt.calibration.modes import LOOSE_SHARE, SWEEP_SHARES, exit_thresholds, modes_of, plan_modes
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.manifest import NllRiskEntry, NllRiskTarget, RiskEntry, RiskTarget
from exeunt.compression.variant import SkippedKV, Variant
from tests.calibration.conftest import BLOCKS, VOCAB, random_exit
from tests.calibration.silent_progress import SilentProgress

FULL, SMALL_KV = Variant("full", "full", False), Variant("full", "int4", False)


def rows() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randint(VOCAB, (n,), generator=g) for n in (40, 40, 17, 40, 30)]


def models(decoder: Decoder) -> dict[Variant, ForcedModel]:
    exits = (random_exit(0, 1), random_exit(2, 2))
    return {v: ForcedModel(decoder, v.kv_cache, exits) for v in (FULL, SMALL_KV)}


def test_figures_equal_a_plain_computation(decoder: Decoder) -> None:
    modes = [Mode(FULL), Mode(FULL, 0.55, 0.1), Mode(SMALL_KV)]
    told: list[int] = []
    held = models(decoder)
    table = evaluate_modes(modes, held, rows(), text="t", batch_tokens=90, seed=0, advance=told.append)
    assert sum(told) == 3 * 167
    (batch,) = batches(rows(), 1000)
    model = held[FULL]
    entry, final = model.full_depth(batch)
    full = decoder.head(final)
    early, depth = torch.empty_like(full), torch.zeros(batch.tokens)

    def sink(number: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        early[tokens], depth[tokens] = logits, float(model.depth(number))

    model.with_exits(batch, 0.55, entry, sink)
    reference, result, small = table.results
    targets = batch.targets
    assert reference.perplexity.value == pytest.approx(
        math.exp(F.cross_entropy(full, targets, ignore_index=-1)), rel=1e-4
    )
    assert result.perplexity.value == pytest.approx(
        math.exp(F.cross_entropy(early, targets, ignore_index=-1)), rel=1e-4
    )
    assert result.perplexity_increase.value == pytest.approx(
        result.perplexity.value - reference.perplexity.value, rel=1e-6
    )
    kl = F.kl_div(early.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="batchmean")
    assert result.kl.value == pytest.approx(float(kl), rel=1e-3)
    agreement = (early.argmax(-1) == full.argmax(-1)).float()
    assert result.agreement.value == pytest.approx(float(agreement.mean()))
    assert result.mean_depth.value == pytest.approx(float(depth.mean()))
    left = depth < BLOCKS
    assert result.exit_rate.value == pytest.approx(float(left.sum()) / (len(left) - len(rows())))
    assert 0.1 < result.exit_rate.value < 0.9
    assert result.disagreement is not None
    assert result.disagreement.value == pytest.approx(1 - float(agreement[left].mean()))
    assert sum(result.by_exit) == int(left.sum())
    assert reference.kl.value == pytest.approx(0.0, abs=1e-9)
    assert reference.agreement.value == 1.0
    assert small.kl.value > 0
    assert small.mean_depth.value == BLOCKS


def test_with_backfill_who_stays_is_at_full_depth(decoder: Decoder) -> None:
    modes = [Mode(FULL), Mode(FULL, 0.55), Mode(FULL, 0.55, None, "backfill")]
    held = models(decoder)
    _, propagated, backfilled = evaluate_modes(modes, held, rows(), text="t", batch_tokens=90, seed=0).results
    (batch,) = batches(rows(), 1000)
    model = held[FULL]
    states, final = model.full_depth_at_exits(batch)
    logits, depth = decoder.head(final), torch.full((batch.tokens,), float(BLOCKS))
    may_leave = batch.positions > 0
    backwards = zip(reversed(model.exits), reversed(states), strict=True)
    for head, hidden in backwards:  # the first exit has the last word
        gate = head.gate(hidden, torch.where(may_leave, 0.55, torch.inf), decoder.project_exit)
        logits[gate.leaves] = gate.logits
        depth[gate.leaves] = float(head.depth)
    assert backfilled.perplexity.value == pytest.approx(
        math.exp(F.cross_entropy(logits, batch.targets, ignore_index=-1)), rel=1e-4
    )
    assert backfilled.mean_depth.value == pytest.approx(float(depth.mean()))
    assert sum(backfilled.by_exit) == int((depth < BLOCKS).sum())
    assert min(backfilled.by_exit) > 0
    stayed = depth == BLOCKS
    agreement = (logits.argmax(-1) == decoder.head(final).argmax(-1)).float()
    assert agreement[stayed].min() == 1.0
    assert backfilled.agreement.value == pytest.approx(float(agreement.mean()))
    assert backfilled.agreement.value > propagated.agreement.value
    assert backfilled.record().skipped_kv == "backfill"
    assert backfilled.mode.name == "full/full exits at 0.55, uncertified"


def test_intervals_hold_their_value_and_come_from_the_seed(decoder: Decoder) -> None:
    modes = [Mode(FULL), Mode(FULL, 0.55)]

    def table(seed: int) -> tuple[float, float, float]:
        held = evaluate_modes(modes, models(decoder), rows(), text="t", batch_tokens=90, seed=seed)
        measure = held.results[1].perplexity
        return measure.low, measure.value, measure.high

    low, value, high = table(1)
    assert low < value < high
    assert table(1) == (low, value, high)
    assert table(2)[0] != low


def test_the_table_reads_and_the_records_are_valid(decoder: Decoder) -> None:
    modes = [Mode(FULL), Mode(FULL, 0.55, 0.1), Mode(SMALL_KV, 0.4)]
    table = evaluate_modes(modes, models(decoder), rows(), text="t", batch_tokens=90, seed=0)
    lines = table.rows()
    assert [line[0] for line in lines] == [
        "full/full",
        "full/full exits 10% certified, propagate",
        "full/int4 exits at 0.40, uncertified, propagate",
    ]
    assert all(len(line) == len(table.HEADERS) for line in lines)
    assert table.results[1].record().early_exit == "approximate"
    assert table.results[1].record().skipped_kv == "propagate"
    assert table.results[0].record().early_exit == "off"


def entry(variant: Variant, skipped_kv: SkippedKV, *lines: RiskTarget) -> RiskEntry:
    return RiskEntry(
        weights=variant.weights,
        kv_cache=variant.kv_cache,
        linear_block=variant.linear_block,
        skipped_kv=skipped_kv,
        targets=lines,
    )


def certified(target: float, threshold: float, rate: float) -> RiskTarget:
    return RiskTarget(target=target, certified=True, threshold=threshold, exit_rate=rate)


def test_every_certified_target_is_a_mode_and_a_loose_one_where_none_lets_many_leave() -> None:
    failed = RiskTarget(target=0.01, certified=False, reason="too few")
    table = [
        entry(FULL, "backfill", failed, certified(0.05, 0.9, 0.2), certified(0.1, 0.9, 0.2)),
        entry(SMALL_KV, "propagate", failed, certified(0.05, 0.95, 0.03)),
    ]
    modes = modes_of([SMALL_KV, FULL], FULL, SMALL_KV, table, {FULL: 0.5, SMALL_KV: 0.6})
    assert modes == [
        Mode(FULL),
        Mode(FULL, 0.9, 0.05, "backfill"),
        Mode(SMALL_KV),
        Mode(SMALL_KV, 0.6, None, "backfill"),
        Mode(SMALL_KV, 0.95, 0.05),
        Mode(SMALL_KV, 0.6),
    ]


def nll_entry(variant: Variant, skipped_kv: SkippedKV, *lines: NllRiskTarget) -> NllRiskEntry:
    return NllRiskEntry(
        weights=variant.weights,
        kv_cache=variant.kv_cache,
        linear_block=variant.linear_block,
        skipped_kv=skipped_kv,
        targets=lines,
        clip=3.0,
    )


def certified_nats(target: float, threshold: float, rate: float = 0.05) -> NllRiskTarget:
    return NllRiskTarget(target=target, certified=True, threshold=threshold, exit_rate=rate)


def test_certified_targets_of_the_nll_increase_are_modes_beside_those_of_disagreement() -> None:
    failed = NllRiskTarget(target=0.01, certified=False, reason="too few")
    table = [entry(FULL, "backfill", certified(0.05, 0.9, 0.05), certified(0.1, 0.8, 0.08))]
    nats = [
        nll_entry(FULL, "backfill", failed, certified_nats(0.02, 0.8), certified_nats(0.05, 0.7)),
        nll_entry(FULL, "propagate", certified_nats(0.02, 0.75)),
    ]
    shown = modes_of([FULL], FULL, FULL, table, {}, nll_table=nats)
    assert shown == [
        Mode(FULL),
        Mode(FULL, 0.9, 0.05, "backfill"),
        Mode(FULL, 0.8, 0.1, "backfill", 0.02),
        Mode(FULL, 0.7, None, "backfill", 0.05),
    ]
    assert [mode.name for mode in shown[2:]] == [
        "full/full exits 10% and 0.02 nats certified",
        "full/full exits 0.05 nats certified",
    ]
    both = modes_of([FULL], FULL, FULL, table, {}, nll_table=nats, both=True)
    assert both[len(shown) :] == [Mode(FULL, 0.75, None, "propagate", 0.02)]
    assert both[-1].name == "full/full exits 0.02 nats certified, propagate"


def test_no_looser_row_where_a_target_of_the_nll_increase_lets_many_leave() -> None:
    nats = [nll_entry(FULL, "backfill", certified_nats(0.05, 0.7, 0.2))]
    shown = modes_of([FULL], FULL, SMALL_KV, [], {FULL: 0.4}, nll_table=nats)
    assert shown == [Mode(FULL), Mode(FULL, 0.7, None, "backfill", 0.05)]


def test_propagate_has_rows_for_the_deployed_variant_alone_unless_all_are_asked_for() -> None:
    thresholds: dict[SkippedKV, float] = {"backfill": 0.8, "propagate": 0.9}
    table = [
        entry(variant, skipped_kv, certified(0.05, threshold, 0.2))
        for variant in (FULL, SMALL_KV)
        for skipped_kv, threshold in thresholds.items()
    ]
    deployed = [Mode(SMALL_KV), Mode(SMALL_KV, 0.8, 0.05, "backfill"), Mode(SMALL_KV, 0.9, 0.05)]
    backfilled = Mode(FULL, 0.8, 0.05, "backfill")
    assert modes_of([SMALL_KV, FULL], FULL, SMALL_KV, table, {}) == [Mode(FULL), backfilled, *deployed]
    assert modes_of([SMALL_KV, FULL], FULL, SMALL_KV, table, {}, both=True) == [
        Mode(FULL),
        backfilled,
        Mode(FULL, 0.9, 0.05),
        *deployed,
    ]


def test_the_sweep_is_the_deployed_variants_and_lets_as_many_leave_as_it_says(decoder: Decoder) -> None:
    held = models(decoder)
    plan = plan_modes(held, [SMALL_KV, FULL], FULL, SMALL_KV, [], rows(), SilentProgress(), batch_tokens=1000)
    assert {mode.variant for mode in plan.sweep} == {SMALL_KV}
    assert {mode.target for mode in plan.sweep} == {None}
    backfilled = [mode for mode in plan.sweep if mode.skipped_kv == "backfill"]
    assert len(backfilled) == len(SWEEP_SHARES)
    assert [mode.threshold for mode in plan.sweep if mode.skipped_kv == "propagate"] == [
        mode.threshold for mode in backfilled[::2]
    ]
    table = evaluate_modes(plan.modes, held, rows(), text="t", batch_tokens=90, seed=0, sweep=plan.sweep)
    assert tuple(result.mode for result in table.results) == plan.modes
    rates = [result.exit_rate.value for result in table.sweep[: len(backfilled)]]
    assert rates == pytest.approx(SWEEP_SHARES, abs=0.01)


def test_without_exits_there_is_nothing_to_sweep(decoder: Decoder) -> None:
    held = {FULL: ForcedModel(decoder, "full", ())}
    plan = plan_modes(held, [FULL], FULL, FULL, [], rows(), SilentProgress(), batch_tokens=1000)
    assert (plan.modes, plan.sweep) == ((Mode(FULL),), ())


def test_a_loose_threshold_lets_about_a_seventh_leave(decoder: Decoder) -> None:
    model = models(decoder)[FULL]
    (threshold,) = exit_thresholds(model, rows(), (LOOSE_SHARE,), SilentProgress(), batch_tokens=1000)
    (batch,) = batches(rows(), 1000)
    left: list[int] = []
    entry_state, _ = model.full_depth(batch)
    model.with_exits(
        batch, threshold, entry_state, lambda number, tokens, _: left.append(len(tokens) * (number < 2))
    )
    assert 0.05 < sum(left) / batch.tokens < 0.4
