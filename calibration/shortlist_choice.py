"""Which tokens the exits look at first: the whole vocabulary, or a shortlist of those that full depth says most often.

A look at the vocabulary costs as much as blocks, and most looks are in vain. A shortlist (FR-Spec, arXiv 2502.14856,
has one for drafts) makes them cheaper by its share of the vocabulary, and blinder: where the exit would say a token
outside of it, its logits do not show that. So it turns away only whom all logits would hardly let go, and these decide
about the others. The blinder it is the more pass it in vain. How large it should be depends on what looks cost here; so
a few sizes are tried with a gate of the logits alone, on exits as they were trained. Measured costs say which of them
save about as much as any; which of these computes least is counted, so that the noise of clocks does not decide it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_training import Labelled, Project, TrainedHead, head_logits
from exeunt.calibration.exit_worth import WORTH, Confidences, ExitWorth, choose_list_ratio
from exeunt.calibration.gate_training import logistic_regression
from exeunt.compression.exit_output import Shortlist
from exeunt.kernels.exit_gate.reference import confidence_of, gate_features

SHARES: Final = (16, 8, 4)
"""Of the vocabulary: a sixteenth, an eighth, a quarter."""
LEAST_TOKENS: Final = 64
"""A shortlist of fewer saves nothing."""
MOST_TOKENS: Final = 4_096
"""Of the select split that sizes are compared on, behind each exit."""


@dataclass(frozen=True, slots=True)
class ShortlistChoice:
    """The shortlist, None for the whole vocabulary, and what was expected of each size.

    A size of None is the whole vocabulary. A saving is that of the best exit alone, as a share of the blocks, net of
    gates and looks, averaged over the risk targets; below 0 no exit pays.
    """

    shortlist: Shortlist | None
    savings: tuple[tuple[int | None, float], ...]


def shortlist_sizes(vocab_size: int) -> tuple[int, ...]:
    """The sizes that are tried, ascending: multiples of 16, which fill the kernels' vectors."""
    sizes = {-(-vocab_size // (16 * share)) * 16 for share in SHARES}
    return tuple(sorted(size for size in sizes if LEAST_TOKENS <= size <= vocab_size // 2))


def most_frequent(top: Tensor, vocab_size: int, size: int) -> Shortlist:
    """The `size` tokens that occur most often in `top` [T] int64; those as frequent by their number."""
    counts = torch.bincount(top.cpu(), minlength=vocab_size)
    order = torch.argsort(counts, descending=True, stable=True)
    return Shortlist(order[:size].sort().values)


@torch.no_grad()
def choose_shortlist(
    heads: Mapping[int, TrainedHead],
    select: Callable[[int], Labelled],
    top: Tensor,
    vocab_size: int,
    project: Project,
    blocks: int,
    costs: ExitCosts,
    counted: ExitCosts,
    targets: Sequence[float],
    advance: Callable[[int], None] = lambda _tokens: None,
) -> ShortlistChoice:
    """The shortlist with which the best of the exits, `heads` by their block, computes least, of those that save most.

    Those save most that are expected to come within `WORTH` of the best at measured `costs`. What is computed, less
    what is saved, is in `counted` multiply-accumulates.

    `select` gives the select split behind a block, `top` [T] are full depth's top tokens on the fit split, `blocks` the
    model's. Of both costs the sizes that have a look measured are tried. `advance` is told the tokens looked at behind
    each exit, `planned_shortlist_tokens` in all.
    """
    priced = dict(costs.looks)
    sizes: list[int | None] = [None, *(size for size in shortlist_sizes(vocab_size) if size in priced)]
    lists = {size: most_frequent(top, vocab_size, size) for size in sizes if size is not None}
    best, counts = (
        dict.fromkeys(sizes, -np.inf),
        dict.fromkeys(sizes, -np.inf),
    )  # savings, measured and counted
    for block, head in heads.items():
        data = select(block).rows(slice(0, MOST_TOKENS))
        found, agrees = _confidences(head, data, lists, project)
        for size in sizes:
            steps = Confidences(torch.ones_like(found[size]), found[size], found[None], agrees)
            worth = ExitWorth(block + 1, blocks, costs.with_shortlist(size), targets)
            ratio, saving = choose_list_ratio(steps, worth)
            best[size] = max(best[size], saving)
            by_count = replace(worth, costs=counted.with_shortlist(size))
            counts[size] = max(counts[size], by_count.saving(*steps.thresholds(ratio), agrees))
        advance(data.tokens)
    most = max(best.values())
    by_size = (*sizes[1:], None)  # ascending: the whole vocabulary last
    kept = max((size for size in by_size if most - best[size] <= WORTH), key=lambda size: counts[size])
    return ShortlistChoice(None if kept is None else lists[kept], tuple(best.items()))


def planned_shortlist_tokens(exits: int, select: int) -> int:
    """Tokens that `choose_shortlist` looks at, behind so many exits and with so many in the select split."""
    return exits * min(select, MOST_TOKENS)


def _confidences(
    head: TrainedHead,
    data: Labelled,
    lists: Mapping[int, Shortlist],
    project: Project,
) -> tuple[dict[int | None, Tensor], Tensor]:
    """By size, a confidence [T] from the log-odds and the margin of its logits; and whether all logits agree [T]."""
    ids: dict[int | None, Tensor | None] = {None: None}
    ids |= {size: shortlist.ids.to(head.adapter.device) for size, shortlist in lists.items()}
    parts: dict[int | None, list[Tensor]] = {size: [] for size in ids}
    agrees = []
    for part, _, logits in head_logits(head.norm, head.adapter, data, project):
        agrees.append(logits.argmax(-1) == part.top)
        for size, chosen in ids.items():
            decisive = logits if chosen is None else logits[:, chosen]
            parts[size].append(gate_features(torch.zeros_like(logits[:, 0]), decisive)[:, 1:])
    truth = torch.cat(agrees)
    features = {size: torch.cat(own) for size, own in parts.items()}
    return {
        size: confidence_of(own, logistic_regression(own, truth)) for size, own in features.items()
    }, truth
