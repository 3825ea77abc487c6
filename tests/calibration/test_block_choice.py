"""The block is chosen by what replacing it costs; costs are those of the decoder with that block replaced."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.block_choice import candidates_of, choice_work, choose_block
from exeunt.calibration.block_fitter import BlockFit
from exeunt.calibration.replacement import losses_of
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock
from tests.calibration.conftest import BLOCKS
from tests.calibration.counted_weights import streamed_decoder
from tests.calibration.planted import PLANTED, fitted, planted_block, spoken, text, with_planted


def replaced_loss(model: ForcedModel, maps: Sequence[LinearBlock], rows: Sequence[Tensor]) -> float:
    """Mean −log probability with the blocks replaced, one after another in a plain loop."""
    (batch,) = batches(rows, 100_000)
    by_block = {each.index: each for each in maps}
    hidden = model.decoder.embed(batch.token_ids, batch.positions)
    for block in range(BLOCKS):
        if block in by_block:
            hidden = by_block[block].apply(hidden)
        else:
            pages, geometry = model.pages(batch), batch.geometry(model.layout.page_tokens)
            hidden = model.decoder.run_blocks(hidden, geometry, pages, block, block + 1)
    return float(F.cross_entropy(model.decoder.head(hidden), batch.targets, ignore_index=-1))


def test_losses_are_those_of_a_plain_loop(decoder: Decoder, tmp_path: Path) -> None:
    model, rows = ForcedModel(decoder, "int4", ()), text(7, 3)
    maps = [fit.map for fit in fitted(model, tmp_path).fits]
    sets = [[maps[2]], [maps[0]], [maps[1], maps[3]]]
    told: list[int] = []
    losses = losses_of(model, sets, rows, batch_tokens=130, seed=0, advance=told.append)
    assert sum(told) == (BLOCKS + 1) * 7 * 64
    assert losses.scored.sum() == 7 * 63
    assert losses.perplexity(None).value == pytest.approx(np.exp(replaced_loss(model, [], rows)), rel=1e-5)
    for number, group in enumerate(sets):
        found, wanted = losses.perplexity(number), np.exp(replaced_loss(model, group, rows))
        assert found.value == pytest.approx(wanted, rel=1e-5)
        assert losses.increase(number).value == pytest.approx(found.value - losses.perplexity(None).value)

    told.clear()
    once_more = losses_of(
        model, sets[::-1], rows, batch_tokens=130, seed=0, known=losses, advance=told.append
    )
    assert sum(told) == (BLOCKS + 1) * 7 * 64
    assert np.array_equal(once_more.unreplaced, losses.unreplaced)
    assert all(np.array_equal(a, b) for a, b in zip(once_more.replaced, losses.replaced[::-1], strict=True))


def test_one_replacement_is_the_decoders_own(decoder: Decoder, tmp_path: Path) -> None:
    model, rows = ForcedModel(decoder, "int4", ()), text(5, 3)
    linear = fitted(model, tmp_path).fits[2].map
    losses = losses_of(model, [[linear]], rows, batch_tokens=10_000, seed=0)
    served = ForcedModel(decoder.with_linear_block(linear), "int4", ())
    (batch,) = batches(rows, 10_000)
    logits = decoder.head(served.full_depth(batch)[1])
    wanted = float(F.cross_entropy(logits, batch.targets, ignore_index=-1, reduction="sum"))
    assert losses.replaced[0].sum() == pytest.approx(wanted, rel=1e-6)


def test_a_streamed_block_is_read_once_for_all_replacements(
    checkpoint: Path, decoder: Decoder, tmp_path: Path
) -> None:
    streamed, weights = streamed_decoder(checkpoint)
    rows, maps = text(5, 3), [fit.map for fit in fitted(ForcedModel(decoder, "int4", ()), tmp_path).fits]
    sets = [[each] for each in maps]
    found, wanted = (
        losses_of(ForcedModel(each, "int4", ()), sets, rows, batch_tokens=130, seed=0)
        for each in (streamed, decoder)
    )
    assert weights.asked == list(range(BLOCKS))
    assert all(np.array_equal(a, b) for a, b in zip(found.replaced, wanted.replaced, strict=True))


def test_a_planted_affine_block_is_chosen_and_costs_nothing(decoder: Decoder, tmp_path: Path) -> None:
    model = with_planted(decoder)
    rows, visitor = spoken(model, 6, 3), fitted(model, tmp_path)
    assert visitor.fits[PLANTED].r2_cut == pytest.approx(1.0, abs=1e-4)
    told: list[int] = []
    choice, losses = choose_block(
        model, visitor.fits, rows, None, candidates=3, batch_tokens=200, seed=0, advance=told.append
    )
    assert sum(told) == choice_work(rows, BLOCKS, None, 3)
    assert choice.chosen is visitor.fits[PLANTED]
    assert choice.cost is not None
    assert choice.cost.increase.value == pytest.approx(0.0, abs=0.01)
    assert choice.cost.increase.high < 0.05
    others = [each for each in choice.candidates if each.blocks != (PLANTED,)]
    assert len(others) == 2
    assert all(each.increase.low > choice.cost.increase.high for each in others)
    assert choice.together is not None
    assert choice.together.blocks == tuple(each.blocks[0] for each in choice.candidates)
    assert choice.together.increase.value > max(each.increase.value for each in choice.candidates)
    assert (choice.tokens, choice.text_blocks) == (losses.tokens, losses.text_blocks) == (384, 6)


def test_a_named_block_is_taken_and_measured_alone(decoder: Decoder, tmp_path: Path) -> None:
    model, rows = with_planted(decoder), text(4, 3)
    visitor = fitted(model, tmp_path)
    told: list[int] = []
    choice, _ = choose_block(model, visitor.fits, rows, 3, batch_tokens=200, seed=0, advance=told.append)
    assert sum(told) == choice_work(rows, BLOCKS, 3)
    assert choice.chosen is visitor.fits[3]
    assert [each.blocks for each in choice.candidates] == [(3,)]
    assert choice.together is None


def made_up(r2: Sequence[float], missed: Sequence[float]) -> list[BlockFit]:
    block = planted_block()
    return [
        BlockFit(index, a, a, b, replace(block, index=index))
        for index, (a, b) in enumerate(zip(r2, missed, strict=True))
    ]


def test_candidates_miss_least_and_the_best_explained_is_among_them() -> None:
    fits = made_up([0.9, 0.3, 0.2, 0.5, 0.4], [0.8, 0.1, 0.3, 0.05, 0.2])

    def blocks(wanted: int | None, count: int | None) -> list[int]:
        return [fit.block for fit in candidates_of(fits, wanted, count)]

    assert blocks(None, 1) == [3]
    assert blocks(None, 2) == [0, 3]
    assert blocks(None, 4) == [0, 1, 3, 4]
    assert blocks(None, 9) == blocks(None, None) == [0, 1, 2, 3, 4]
    assert blocks(2, 4) == [2]
    assert [fit.block for fit in candidates_of(made_up([0.1, 0.9], [0.5, 0.1]), None, 1)] == [1]


def test_intervals_are_drawn_by_documents(decoder: Decoder, tmp_path: Path) -> None:
    model, rows = ForcedModel(decoder, "int4", ()), text(40, 3)
    fits = fitted(model, tmp_path).fits
    apart, _ = choose_block(model, fits, rows, 1, batch_tokens=2000, seed=0)
    documents = [number // 2 for number in range(40)]
    together, losses = choose_block(model, fits, rows, 1, batch_tokens=2000, seed=0, documents=documents)
    assert (apart.text_blocks, together.text_blocks) == (40, 20)
    assert losses.scored.tolist() == [2 * 63.0] * 20
    known = losses_of(model, [[fits[1].map]], rows, batch_tokens=2000, seed=0, known=losses)
    assert np.array_equal(known.replaced[0], losses.replaced[0])
