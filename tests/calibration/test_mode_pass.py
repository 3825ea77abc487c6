"""What modes make of a text, in whatever pieces, is what a plain loop over tokens and exits makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration import teacher_forcing
from exeunt.calibration.evaluation import EvaluationTable, Mode, evaluate_modes
from exeunt.calibration.journal import NoJournal
from exeunt.calibration.scored_text import ScoredText
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import SkippedKV, Variant
from tests.calibration.conftest import BLOCKS, HIDDEN, VOCAB, confirmed_exit, random_exit
from tests.compression.paged_generation import batch_of, sequential_pages

THRESHOLD = 0.55
FULL, SMALL_KV = Variant("full", "full", False), Variant("full", "int4", False)
LINEAR, SMALL_LINEAR = Variant("full", "full", True), Variant("full", "int4", True)
RANK, REPLACED = 3, 1
BLOCK = HIDDEN * 64 + 32 * HIDDEN + 3 * HIDDEN * 48 + 4 * HIDDEN
ASKED = 2 * HIDDEN + HIDDEN * HIDDEN + 8 * HIDDEN + 8
KV_ONLY = HIDDEN * 32 + 2 * HIDDEN
HEAD = HIDDEN * VOCAB + 2 * HIDDEN
JUDGE = 4 * 8 + 8
METHODS: tuple[SkippedKV, ...] = ("propagate", "backfill")


def rows() -> list[Tensor]:
    g = torch.Generator().manual_seed(9)
    return [torch.randint(VOCAB, (n,), generator=g) for n in (40, 33, 17)]


def models(decoder: Decoder) -> dict[Variant, ForcedModel]:
    g = torch.Generator().manual_seed(4)
    down, up = (torch.randn(shape, generator=g) * 0.2 for shape in ((RANK, HIDDEN), (HIDDEN, RANK)))
    linear = decoder.with_linear_block(LinearBlock(REPLACED, down, up, torch.zeros(HIDDEN)))
    exits = (confirmed_exit(0, 1), random_exit(2, 2))
    return {
        variant: ForcedModel(linear if variant.linear_block else decoder, variant.kv_cache, exits)
        for variant in (FULL, SMALL_KV, LINEAR, SMALL_LINEAR)
    }


def modes() -> list[Mode]:
    exits = [Mode(variant, THRESHOLD, None, method) for variant in models_order() for method in METHODS]
    return [Mode(FULL), *(Mode(variant) for variant in models_order()[1:]), *exits]


def models_order() -> tuple[Variant, ...]:
    return FULL, SMALL_KV, LINEAR, SMALL_LINEAR


@dataclass
class Told:
    """What one token was told and cost."""

    logits: Tensor
    left: int
    computed: float


def block_cost(model: ForcedModel, block: int, position: int) -> float:
    if model.decoder.linear_block is not None and block == REPLACED:
        return 2 * HIDDEN * RANK
    return BLOCK + 2 * 32 * (position + 1)


def look_cost(head: ExitHead, looked: int, whole: int) -> int:
    """Of a look, at the vocabulary, or at the shortlist with its judge and then at the vocabulary with another."""
    if head.shortlist is None:
        return looked * HIDDEN * VOCAB
    return looked * (HIDDEN * len(head.shortlist) + JUDGE) + whole * (HIDDEN * VOCAB + JUDGE)


@torch.inference_mode()
def one_by_one(model: ForcedModel, row: Tensor, mode: Mode) -> list[Told]:
    """Every token of a row, one after another, past every exit: who leaves, what is said there, and what it takes."""
    decoder, told = model.decoder, []
    pages, tables = sequential_pages(model.layout, 1, len(row), decoder.device)
    limit = torch.tensor([float("inf") if mode.threshold is None else mode.threshold])
    for position in range(len(row)):
        batch = batch_of([range(position, position + 1)], tables, model.layout.page_tokens)
        hidden, start, computed = decoder.embed(row[position : position + 1], batch.positions), 0, 0.0
        found: tuple[Tensor, int] | None = None
        for number in range(len(model.exits) + 1):
            stop = model.depth(number)
            hidden = decoder.run_blocks(hidden, batch, pages, start, stop)
            computed += sum(block_cost(model, block, position) for block in range(start, stop))
            start = stop
            if found is not None or number == len(model.exits) or position == 0 or mode.threshold is None:
                continue
            gate = model.exits[number].gate(hidden, limit, decoder.project)
            computed += ASKED + look_cost(model.exits[number], len(gate.looked), len(gate.whole))
            if bool(gate.leaves):
                found = gate.logits[0], number
                if mode.skipped_kv == "propagate":
                    decoder.project_kv(hidden, batch, pages, start, BLOCKS)
                    skipped = [b for b in range(start, BLOCKS) if b in model.layout.blocks]
                    computed += len(skipped) * KV_ONLY
                    break
        if found is None:
            found = decoder.head(hidden)[0], len(model.exits)
            computed += HEAD
        told.append(Told(*found, computed))
    return told


def plain_figures(held: Mapping[Variant, ForcedModel], mode: Mode) -> dict[str, float]:
    """Perplexity, KL and so on of a mode by the loop."""
    model, texts = held[mode.variant], rows()
    told = [each for row in texts for each in one_by_one(model, row, mode)]
    full = [each for row in texts for each in one_by_one(held[FULL], row, Mode(FULL))]
    own = [each for row in texts for each in one_by_one(model, row, Mode(mode.variant))]
    logits, wanted = torch.stack([each.logits for each in told]), torch.stack([each.logits for each in full])
    targets = torch.cat([torch.cat([row[1:], torch.tensor([-1])]) for row in texts])
    left = torch.tensor([each.left for each in told])
    away = left < len(model.exits)
    own_top = torch.stack([each.logits for each in own]).argmax(-1)
    depths = torch.tensor([float(model.depth(number)) for number in left.tolist()])
    figures = {
        "perplexity": float(F.cross_entropy(logits, targets, ignore_index=-1).exp()),
        "kl": float(
            F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
        ),
        "agreement": float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "mean_depth": float(depths.mean()),
        "exit_rate": float(away.sum()) / (len(away) - len(rows())),  # a row's first token may not leave
        "passes_saved": 1 - float(depths.mean()) / BLOCKS,
        "compute_saved": 1 - sum(each.computed for each in told) / sum(each.computed for each in full),
    }
    if bool(away.any()):
        figures["disagreement"] = float((logits.argmax(-1) != own_top)[away].float().mean())
    return figures


@pytest.fixture(scope="module")
def table(decoder: Decoder) -> EvaluationTable:
    return evaluate_modes(modes(), models(decoder), rows(), text="t", batch_tokens=60, seed=0)


@pytest.mark.parametrize("mode", modes(), ids=lambda mode: mode.name)
def test_every_figure_equals_a_loop_over_tokens(decoder: Decoder, table: EvaluationTable, mode: Mode) -> None:
    (result,) = (each for each in table.results if each.mode == mode)
    for name, value in plain_figures(models(decoder), mode).items():
        measure = getattr(result, name)
        assert measure.value == pytest.approx(value, rel=2e-3, abs=1e-4), name
    if mode.threshold is not None:
        assert min(result.by_exit) >= 5, "every way out is taken"


def flat(table: EvaluationTable) -> list[float]:
    """Every figure and interval of a table."""
    found = []
    for result in table.results:
        for name in result.__dataclass_fields__:
            value = getattr(result, name)
            if hasattr(value, "low"):
                found += [value.value, value.low, value.high]
    return found


@pytest.mark.parametrize(("rows_at_once", "batch_tokens"), [(1, 60), (3, 40), (64, 1000)])
def test_in_whatever_pieces_the_figures_are_the_same(
    decoder: Decoder,
    table: EvaluationTable,
    monkeypatch: pytest.MonkeyPatch,
    rows_at_once: int,
    batch_tokens: int,
) -> None:
    monkeypatch.setattr(teacher_forcing, "_LOGITS_IN_CACHE", rows_at_once * VOCAB)
    monkeypatch.setattr(teacher_forcing, "LEAST_LOGIT_ROWS", 1)
    again = evaluate_modes(modes(), models(decoder), rows(), text="t", batch_tokens=batch_tokens, seed=0)
    assert flat(again) == pytest.approx(flat(table), rel=1e-4, abs=2e-6)
    assert [each.by_exit for each in again.results] == [each.by_exit for each in table.results]


def test_the_reference_differs_from_itself_by_nothing(table: EvaluationTable) -> None:
    reference = table.results[0]
    assert (reference.kl.value, reference.kl.low, reference.kl.high) == (0.0, 0.0, 0.0)
    assert (reference.perplexity_ratio.low, reference.perplexity_ratio.high) == (1.0, 1.0)
    assert (reference.compute_saved.low, reference.compute_saved.high) == (0.0, 0.0)
    assert reference.exits_ratio is None


def test_what_exits_cost_is_held_against_the_same_variant(table: EvaluationTable) -> None:
    found = {each.mode: each for each in table.results}
    exits, off = found[Mode(SMALL_KV, THRESHOLD)], found[Mode(SMALL_KV)]
    assert exits.exits_ratio is not None
    assert exits.exits_ratio.value == pytest.approx(exits.perplexity.value / off.perplexity.value)
    assert exits.perplexity_ratio.value == pytest.approx(
        exits.perplexity.value / table.results[0].perplexity.value
    )
    assert exits.exits_ratio.low < exits.exits_ratio.value < exits.exits_ratio.high


def test_with_backfill_exits_only_cost_compute(table: EvaluationTable) -> None:
    found = {each.mode: each for each in table.results}
    backfilled, propagated = (
        found[Mode(FULL, THRESHOLD, None, method)] for method in ("backfill", "propagate")
    )
    assert backfilled.compute_saved.high < 0
    assert backfilled.passes_saved.value > 0.1
    assert propagated.compute_saved.value > backfilled.compute_saved.value


def test_thresholds_at_their_ends(decoder: Decoder) -> None:
    everywhere, nowhere = Mode(FULL, 0.0, None, "backfill"), Mode(FULL, 1.0)
    evaluated = evaluate_modes(
        [Mode(FULL), everywhere, nowhere], models(decoder), rows(), text="t", batch_tokens=60, seed=0
    )
    off, all_left, none_left = evaluated.results
    tokens = sum(map(len, rows()))
    assert all_left.by_exit == (tokens - len(rows()), 0)  # a row's first token stays
    assert none_left.by_exit == (0, 0)
    assert none_left.disagreement is None
    assert none_left.perplexity.value == pytest.approx(off.perplexity.value)
    assert none_left.mean_depth.value == BLOCKS


class Remembered:
    """A journal in memory that fails after some writes, as a process may."""

    def __init__(self, writes: int = 1000) -> None:
        self.entries: dict[str, tuple[dict[str, Tensor], Any]] = {}
        self._left = writes

    def read(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        return self.entries.get(name)

    def write(self, name: str, tensors: Mapping[str, Tensor], record: Any) -> None:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.entries[name] = ({key: tensor.clone() for key, tensor in tensors.items()}, record)


def test_an_interrupted_evaluation_goes_on_at_the_variant_where_it_stopped(decoder: Decoder) -> None:
    broken = Remembered(writes=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate_modes(modes(), models(decoder), rows(), text="t", batch_tokens=60, seed=0, journal=broken)
    assert len(broken.entries) == 1
    repaired = Remembered()
    repaired.entries = broken.entries
    held = models(decoder)
    told: list[int] = []
    calls = decoder.block_calls.tokens[0]
    again = evaluate_modes(
        modes(), held, rows(), text="t", batch_tokens=60, seed=0, journal=repaired, advance=told.append
    )
    resumed = decoder.block_calls.tokens[0] - calls
    assert resumed == sum(map(len, rows())), "the first family is not run again"
    assert sum(told) == len(modes()) * sum(map(len, rows()))
    plain = evaluate_modes(
        modes(), models(decoder), rows(), text="t", batch_tokens=60, seed=0, journal=NoJournal()
    )
    assert flat(again) == flat(plain)


def test_a_journal_of_other_modes_is_not_believed(decoder: Decoder) -> None:
    journal = Remembered()
    few = [Mode(FULL), Mode(FULL, 0.5)]
    evaluate_modes(few, models(decoder), rows(), text="t", batch_tokens=60, seed=0, journal=journal)
    other = [Mode(FULL), Mode(FULL, 0.6)]
    found, plain = (
        evaluate_modes(other, models(decoder), rows(), text="t", batch_tokens=60, seed=0, journal=each)
        for each in (journal, NoJournal())
    )
    assert flat(found) == flat(plain)


def test_only_what_is_scored_counts(decoder: Decoder) -> None:
    """Windows that overlap: the figures are those of the tokens that count, each in its own window's context."""
    row = rows()[0]
    windows = [row[:20], row[10:30], row[20:40]]
    text = ScoredText(
        tuple(windows),
        (0, 10, 10),
        (int(row[20]), int(row[30]), -1),
        np.zeros(60, np.int64),
        1,
    )
    held = models(decoder)
    mode = Mode(FULL, THRESHOLD)
    result = evaluate_modes([Mode(FULL), mode], held, text, text="t", batch_tokens=1000, seed=0).results[1]
    told = [one_by_one(held[FULL], window, mode) for window in windows]
    counted = [*told[0], *told[1][10:], *told[2][10:]]
    logits = torch.stack([each.logits for each in counted])
    targets = torch.cat([row[1:], torch.tensor([-1])])
    assert result.tokens == 40
    assert result.perplexity.value == pytest.approx(
        float(F.cross_entropy(logits, targets, ignore_index=-1).exp()), rel=1e-3
    )
    assert sum(result.by_exit) == sum(each.left < 2 for each in counted)
