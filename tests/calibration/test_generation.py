"""What modes write is what a plain loop over tokens and exits writes; the judge reads it in a plain pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.errors import CalibrationError
from exeunt.calibration.evaluation import Mode
from exeunt.calibration.generation import (
    GenerationSize,
    continuations,
    distinct_share,
    generate_modes,
    repeated_share,
)
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import KVFormat, SkippedKV, Variant
from tests.calibration.conftest import BLOCKS, HIDDEN, VOCAB, random_exit
from tests.compression.paged_generation import batch_of, sequential_pages

FULL, SMALL_KV = Variant("full", "full", False), Variant("full", "int4", False)
NEW = 24


def prompts(texts: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(VOCAB, (texts, tokens), generator=torch.Generator().manual_seed(2))


def forced(decoder: Decoder, kv: KVFormat = "full", linear: bool = False) -> ForcedModel:
    if linear:
        g = torch.Generator().manual_seed(4)
        up, down = torch.randn(HIDDEN, 3, generator=g) * 0.2, torch.randn(3, HIDDEN, generator=g) * 0.2
        decoder = decoder.with_linear_block(LinearBlock(1, down, up, torch.zeros(HIDDEN)))
    return ForcedModel(decoder, kv, (random_exit(0, 1), random_exit(2, 2)))


@torch.inference_mode()
def plainly(
    model: ForcedModel, prompt: Tensor, threshold: float | None, skipped_kv: SkippedKV
) -> tuple[list[int], list[int]]:
    """A greedy continuation and where each token was said, one token and one block after another."""
    decoder = model.decoder
    pages, tables = sequential_pages(model.layout, 1, len(prompt) + NEW, decoder.device)
    ids, left, token = prompt.tolist(), [], -1
    for position in range(len(prompt) + NEW - 1):
        batch = batch_of([range(position, position + 1)], tables, model.layout.page_tokens)
        hidden = decoder.embed(torch.tensor([ids[position]]), batch.positions)
        said: tuple[int, int] | None = None
        for number in range(len(model.exits) + 1):
            start = 0 if number == 0 else model.depth(number - 1)
            hidden = decoder.run_blocks(hidden, batch, pages, start, model.depth(number))
            if number == len(model.exits) or threshold is None or said is not None or position < len(prompt):
                continue
            gate = model.exits[number].gate(hidden, torch.tensor([threshold]), decoder.project)
            if bool(gate.leaves):
                said = int(gate.logits[0].argmax()), number
                if skipped_kv == "propagate":
                    decoder.project_kv(hidden, batch, pages, model.depth(number), BLOCKS)
                    break
        token, at = said or (int(decoder.head(hidden)[0].argmax()), len(model.exits))
        if position >= len(prompt) - 1:
            ids.append(token)
            left.append(at)
    return ids[len(prompt) :], left


@pytest.mark.parametrize("kv", ["full", "int4"])
@pytest.mark.parametrize("linear", [False, True])
def test_exits_off_is_the_decoders_own_greedy_continuation(
    decoder: Decoder, kv: KVFormat, linear: bool
) -> None:
    model = forced(decoder, kv, linear)
    found = continuations(model, prompts(), NEW, Mode(FULL), temperature=0.0, seed=0)
    assert found.tokens.tolist() == [plainly(model, prompt, None, "backfill")[0] for prompt in prompts()]
    assert set(found.left.flatten().tolist()) == {2}


@pytest.mark.parametrize("skipped_kv", ["propagate", "backfill"])
@pytest.mark.parametrize("kv", ["full", "int4"])
@pytest.mark.parametrize("linear", [False, True])
def test_with_exits_it_is_a_loop_over_tokens_and_exits(
    decoder: Decoder, skipped_kv: SkippedKV, kv: KVFormat, linear: bool
) -> None:
    model, mode = forced(decoder, kv, linear), Mode(FULL, 0.55, None, skipped_kv)
    found = continuations(model, prompts(), NEW, mode, temperature=0.0, seed=0)
    for row, prompt in enumerate(prompts()):
        tokens, left = plainly(model, prompt, 0.55, skipped_kv)
        assert found.tokens[row].tolist() == tokens
        assert found.left[row].tolist() == left
    assert {0, 2} <= set(found.left.flatten().tolist()), "some leave and some stay"


@pytest.mark.parametrize("skipped_kv", ["propagate", "backfill"])
def test_thresholds_at_their_ends(decoder: Decoder, skipped_kv: SkippedKV) -> None:
    model = forced(decoder)
    off = continuations(model, prompts(), NEW, Mode(FULL), temperature=1.0, seed=3)
    never = continuations(model, prompts(), NEW, Mode(FULL, 1.0, None, skipped_kv), temperature=1.0, seed=3)
    always = continuations(model, prompts(), NEW, Mode(FULL, 0.0, None, skipped_kv), temperature=1.0, seed=3)
    assert never.tokens.tolist() == off.tokens.tolist()
    assert set(never.left.flatten().tolist()) == {2}
    assert always.left[:, 1:].max() == 0
    assert always.left[:, 0].tolist() == [2, 2, 2], "the first token comes from the prompt"


def test_noise_is_the_seeds_and_the_rows(decoder: Decoder) -> None:
    model = forced(decoder)

    def written(seed: int, texts: Tensor) -> list[list[int]]:
        return continuations(model, texts, NEW, Mode(FULL), temperature=1.0, seed=seed).tokens.tolist()

    same = prompts()[:1].repeat(3, 1)
    assert written(1, prompts()) == written(1, prompts())
    assert written(1, prompts()) != written(2, prompts())
    assert len({tuple(row) for row in written(1, same)}) == 3, "texts of one prompt differ"


def test_sampled_tokens_have_the_models_probabilities(decoder: Decoder) -> None:
    """The first token of many texts of one prompt: frequencies against probabilities."""
    model, texts = forced(decoder), 4000
    prompt = prompts()[:1]
    drawn = continuations(model, prompt.repeat(texts, 1), 1, Mode(FULL), temperature=1.0, seed=5).tokens[:, 0]
    _, final = model.full_depth(_batch(prompt))
    likely = decoder.head(final[-1:])[0].softmax(-1)
    counts = torch.bincount(drawn, minlength=VOCAB).double()
    expected = likely.double() * texts
    big = expected >= 5
    statistic = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    freedom = int(big.sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def _batch(rows: Tensor) -> SequenceBatch:
    (batch,) = batches(list(rows), rows.numel())
    return batch


def test_the_judge_is_the_reference_at_full_depth(decoder: Decoder) -> None:
    reference, small = forced(decoder), forced(decoder, "int4")
    modes = [Mode(FULL), Mode(SMALL_KV, 0.55), Mode(SMALL_KV, 0.55, None, "backfill")]
    rows = list(prompts(6, 14))
    size = GenerationSize(3, 9, NEW)
    told: list[int] = []
    written = generate_modes(
        modes,
        {FULL: reference, SMALL_KV: small},
        reference,
        rows,
        size,
        lambda ids: " ".join(map(str, ids)),
        seed=1,
        advance=told.append,
    )
    assert [(each.mode, each.temperature) for each in written] == [
        (mode, temperature) for temperature in (0.0, 1.0) for mode in modes
    ]
    assert sum(told) == 6 * 3 * NEW
    asked = torch.stack([rows[place][:9] for place in (0, 2, 4)])
    for each in written:
        model = reference if each.mode.variant == FULL else small
        found = continuations(model, asked, NEW, each.mode, temperature=each.temperature, seed=1)
        _, final = reference.full_depth(_batch(torch.cat([asked, found.tokens], 1)))
        logits = decoder.head(final).view(3, 9 + NEW, VOCAB)[:, 8:-1]
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), found.tokens.reshape(-1))
        assert each.perplexity.value == pytest.approx(float(loss.exp()), rel=1e-4)
        assert each.perplexity.low < each.perplexity.value < each.perplexity.high
        depths = torch.tensor([1.0, 3.0, 4.0])[found.left]
        assert each.mean_depth.value == pytest.approx(float(depths.mean()))
        assert each.exit_rate.value == pytest.approx(float((found.left < 2).float().mean()))
        assert each.prompt == " ".join(map(str, asked[0].tolist()))
        assert each.sample == " ".join(map(str, found.tokens[0].tolist()))
    assert written[1].exit_rate.value > 0.1


def test_repetition_is_counted_within_a_text() -> None:
    assert repeated_share([[1, 2, 3, 4, 1, 2, 3, 4, 5]], 4) == pytest.approx(1 / 6)
    assert repeated_share([[1, 2, 3, 4], [1, 2, 3, 4]], 4) == 0.0
    assert repeated_share([[1, 2]], 4) == 0.0
    assert distinct_share([[1, 2, 1, 2], [3, 4]], 2) == pytest.approx(3 / 4)


def test_what_rows_and_context_do_not_hold_is_refused_or_fitted(decoder: Decoder) -> None:
    model, rows = forced(decoder), [torch.arange(10), torch.arange(20)]
    context = decoder.spec.max_position_embeddings
    for size, says in (
        (GenerationSize(2, 15, 4), "gives 1 prompts of 15"),
        (GenerationSize(1, 15, context), f"context of {context}"),
    ):
        with pytest.raises(CalibrationError, match=says):
            generate_modes([Mode(FULL)], {FULL: model}, model, rows, size, str, seed=0)
    assert GenerationSize(16, 15, 500).fitted(rows, 96) == GenerationSize(1, 15, 81)
    assert GenerationSize(16, 40, 500).fitted(rows, 30) == GenerationSize(2, 10, 20)
    with pytest.raises(CalibrationError, match="cannot be written"):
        GenerationSize(0, 1, 2)
