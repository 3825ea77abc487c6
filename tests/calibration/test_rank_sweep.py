"""The curve of a planted block: free from its own rank on, dearer below it, and its sizes are those of its maps."""

from pathlib import Path

import pytest

from exeunt.calibration.block_choice import choose_block
from exeunt.calibration.rank_sweep import sweep_of, sweep_ranks
from exeunt.calibration.ranked_map import parameters_of
from exeunt.compression.decoder import Decoder
from tests.calibration.conftest import BLOCKS, HIDDEN
from tests.calibration.planted import PLANTED, RANK, fitted, spoken, with_planted


def test_a_planted_block_is_free_from_its_own_rank_on(decoder: Decoder, tmp_path: Path) -> None:
    model = with_planted(decoder)
    rows, visitor = spoken(model, 6, 3), fitted(model, tmp_path)
    choice, losses = choose_block(model, visitor.fits, rows, PLANTED, batch_tokens=200, seed=0)
    parameters = model.decoder.spec.block_parameters
    reductions = [parameters / parameters_of(rank, HIDDEN) for rank in (8, RANK, 2, 1)]
    told: list[int] = []
    sweep = sweep_of(
        model,
        losses,
        visitor.ranked[PLANTED],
        rows,
        reductions=reductions,
        batch_tokens=200,
        seed=0,
        advance=told.append,
    )
    assert sum(told) == (BLOCKS + 1) * 6 * 64
    assert (sweep.block, sweep.tokens, sweep.text_blocks) == (PLANTED, 6 * 64, 6)
    assert [point.rank for point in sweep.points] == [HIDDEN, 8, RANK, 2, 1]
    for point in sweep.points:
        assert point.parameters == visitor.ranked[PLANTED].map.linear_block(0, point.rank).parameters
        assert point.reduction == pytest.approx(parameters / point.parameters)
        assert point.perplexity.value - sweep.perplexity.value == pytest.approx(point.increase.value)
    r2 = [point.r2 for point in sweep.points]
    assert r2 == sorted(r2, reverse=True)
    for whole in sweep.points[:3]:
        assert whole.r2 == pytest.approx(1.0, abs=1e-4)
        assert whole.increase.value == pytest.approx(0.0, abs=0.01)
    for cut in sweep.points[3:]:
        assert cut.r2 < 0.99
        assert cut.increase.low > sweep.points[2].increase.high
    at_budget = next(point for point in sweep.points if point.rank == visitor.fits[PLANTED].map.rank)
    assert choice.cost is not None
    assert at_budget.increase.value == pytest.approx(choice.cost.increase.value, abs=1e-9)


def test_ranks_are_those_that_the_reductions_allow_each_once() -> None:
    # a Mistral block and width: the paper's 34-fold, from 8-fold to 68-fold, and the full rank
    assert sweep_ranks(4096, 218_112_000) == (4096, 3327, 1663, 782, 391)
    assert sweep_ranks(64, 1000) == (64, 1)
