"""What a smaller linear block costs: perplexity against size for one block, from the map of full rank down."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from exeunt.calibration.block_fitter import REDUCTION, RankedFit
from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.ranked_map import parameters_of, rank_within
from exeunt.calibration.replacement import Losses, losses_of
from exeunt.calibration.teacher_forcing import ForcedModel

REDUCTIONS: Final = (8.0, 16.0, REDUCTION, 2 * REDUCTION)
"""How many of a block's parameters there are for one of the map's, beside the map of full rank."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RankPoint:
    """The map of one rank: its size, what it explains on the select split, and what it costs.

    `reduction` is the block's parameters over the map's; `increase` is over no replacement.
    """

    rank: int
    parameters: int
    reduction: float
    r2: float
    perplexity: Measure
    increase: Measure


@dataclass(frozen=True, slots=True)
class RankSweep:
    """The size-for-perplexity curve of one block, the largest map first; `perplexity` is without replacement."""

    block: int
    perplexity: Measure
    points: tuple[RankPoint, ...]
    tokens: int
    text_blocks: int


def sweep_ranks(
    hidden: int, block_parameters: int, reductions: Sequence[float] = REDUCTIONS
) -> tuple[int, ...]:
    """The ranks of a sweep, each once, descending: the full one, and those that the `reductions` allow."""
    allowed = {rank_within(block_parameters / reduction, hidden) for reduction in reductions}
    return tuple(sorted({hidden, *allowed}, reverse=True))


def sweep_of(
    model: ForcedModel,
    known: Losses,
    fit: RankedFit,
    rows: Sequence[Tensor],
    *,
    reductions: Sequence[float] = REDUCTIONS,
    batch_tokens: int,
    seed: int,
    advance: Advance = lambda _tokens: None,
) -> RankSweep:
    """The curve of the block of `fit` under `model`.

    `known` are losses of the same model, `rows` and seed, as `block_choice.choose_block` leaves them. `advance` is told
    `replacement.walk_work` in all.
    """
    spec = model.decoder.spec
    ranks = sweep_ranks(spec.hidden_size, spec.block_parameters, reductions)
    losses = losses_of(
        model,
        [(fit.map.linear_block(fit.block, rank),) for rank in ranks],
        rows,
        batch_tokens=batch_tokens,
        seed=seed,
        known=known,
        advance=advance,
    )
    points = tuple(
        RankPoint(
            rank=rank,
            parameters=parameters_of(rank, spec.hidden_size),
            reduction=spec.block_parameters / parameters_of(rank, spec.hidden_size),
            r2=fit.r2[rank],
            perplexity=losses.perplexity(number),
            increase=losses.increase(number),
        )
        for number, rank in enumerate(ranks)
    )
    return RankSweep(fit.block, losses.perplexity(None), points, losses.tokens, losses.text_blocks)
