"""Which block a linear map replaces: of several candidates the one that costs least perplexity as it is deployed.

R² says how much of what a block adds a map explains, and not how much the rest matters (arXiv 2604.20682: variance is
not importance). So candidates are those whose maps miss least beside the state, and the measured cost decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from exeunt.calibration.block_fitter import BlockFit
from exeunt.calibration.bootstrap import Measure
from exeunt.calibration.replacement import Losses, losses_of, walk_work
from exeunt.calibration.teacher_forcing import ForcedModel

CANDIDATES: Final = 4
TOGETHER: Final = 3
"""So many of the candidates that cost least alone are replaced together, to show what that does."""

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Replacement:
    """What replacing blocks by their maps costs on part of the select split; `increase` is over no replacement."""

    blocks: tuple[int, ...]
    perplexity: Measure
    increase: Measure


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """The block chosen and what the choice rests on: every block's fit, and the cost of each candidate alone.

    `together` replaces the least costly candidates at once, None where there is but one.
    """

    chosen: BlockFit | None
    fits: tuple[BlockFit, ...]
    candidates: tuple[Replacement, ...]
    together: Replacement | None
    tokens: int  # behind the perplexities
    text_blocks: int  # that intervals are drawn from

    @property
    def cost(self) -> Replacement | None:
        """What replacing the chosen block costs."""
        wanted = None if self.chosen is None else (self.chosen.block,)
        return next((each for each in self.candidates if each.blocks == wanted), None)


def candidates_of(
    fits: Sequence[BlockFit], wanted: int | None, count: int | None = CANDIDATES
) -> tuple[BlockFit, ...]:
    """The blocks worth trying, ascending: `wanted` alone where one is named, all where `count` is None.

    They are those where what the map misses is least beside the state, early blocks as well as late ones: a block that
    adds little may be replaced badly. The last of them is the block of the highest R² (at the size budget), unless it
    is there already: so that every report shows what choosing by R² would have cost.
    """
    if wanted is not None:
        return (fits[wanted],)
    ordered = sorted(fits, key=lambda fit: (fit.missed, fit.block))
    tried = ordered if count is None else ordered[: max(count, 1)]
    explained = max(fits, key=lambda fit: (fit.r2_cut, -fit.block))
    if len(tried) > 1 and explained not in tried:
        tried[-1] = explained
    return tuple(sorted(tried, key=lambda fit: fit.block))


def choice_work(
    rows: Sequence[Tensor], blocks: int, wanted: int | None, candidates: int | None = CANDIDATES
) -> int:
    """What `advance` of `choose_block` is told in all, in a model of `blocks` blocks."""
    alone = wanted is not None or blocks == 1 or candidates == 1
    return walk_work(rows, blocks) * (1 if alone else 2)


def choose_block(
    model: ForcedModel,
    fits: Sequence[BlockFit],
    rows: Sequence[Tensor],
    wanted: int | None,
    *,
    candidates: int | None = CANDIDATES,
    batch_tokens: int,
    seed: int,
    documents: Sequence[int] | None = None,
    advance: Advance = lambda _tokens: None,
) -> tuple[BlockChoice, Losses]:
    """The block whose replacement costs least perplexity on `rows`, of those of `candidates_of`, and what was lost.

    `wanted` names the block instead; its cost is measured all the same. `documents` numbers each row's document, for
    the intervals. `advance` is told `choice_work` in all.
    """
    tried = candidates_of(fits, wanted, candidates)
    sets = [(fit.map,) for fit in tried]
    losses = losses_of(
        model, sets, rows, batch_tokens=batch_tokens, seed=seed, documents=documents, advance=advance
    )
    single = tuple(
        Replacement((fit.block,), losses.perplexity(number), losses.increase(number))
        for number, fit in enumerate(tried)
    )
    order = sorted(range(len(tried)), key=lambda number: single[number].increase.value)
    together = None
    if len(tried) > 1:
        group = [tried[number] for number in sorted(order[:TOGETHER])]
        several = losses_of(
            model,
            [[fit.map for fit in group]],
            rows,
            batch_tokens=batch_tokens,
            seed=seed,
            known=losses,
            advance=advance,
        )
        blocks = tuple(fit.block for fit in group)
        together = Replacement(blocks, several.perplexity(0), several.increase(0))
    chosen = tried[order[0]]
    return BlockChoice(chosen, tuple(fits), single, together, losses.tokens, losses.text_blocks), losses
