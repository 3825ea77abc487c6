"""Which tokens decide at the exits: the whole vocabulary, or a shortlist of those that full depth says most often.

A look at the vocabulary costs as much as blocks, and most looks are in vain. A shortlist (FR-Spec, arXiv 2502.14856,
has one for drafts) makes them cheaper by its share of the vocabulary, and blinder: where the exit would say a token
outside of it, its logits do not show that. How large it should be depends on what a look costs here; so a few sizes are
tried with a gate of the logits alone, on exits as they were trained, and the smallest is kept that is expected to save
as much as any, or nearly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.exit_training import Labelled, Project, TrainedHead, head_logits
from exeunt.calibration.gate_training import logistic_regression
from exeunt.calibration.selective import share_within
from exeunt.compression.exit_output import Shortlist
from exeunt.kernels.exit_gate.reference import confidence_of, gate_features

SHARES: Final = (16, 8, 4)
"""Of the vocabulary: a sixteenth, an eighth, a quarter."""
LEAST_TOKENS: Final = 64
"""A shortlist of fewer saves nothing."""
MOST_TOKENS: Final = 4_096
"""Of the select split that sizes are compared on, behind each exit."""
WORTH: Final = 0.01
"""The share of the blocks by which savings count as equal: by as much measured costs differ from one time to the next.
Of equal sizes the smallest is kept, which computes least."""


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
    targets: Sequence[float],
    advance: Callable[[int], None] = lambda _tokens: None,
) -> ShortlistChoice:
    """The smallest shortlist with which the best of the exits, `heads` by their block, is expected to save about most.

    `select` gives the select split behind a block, `top` [T] are full depth's top tokens on the fit split, `blocks` the
    model's. Of `costs` the sizes that have a look measured are tried. `advance` is told the tokens looked at behind
    each exit, `planned_shortlist_tokens` in all.
    """
    priced = dict(costs.looks)
    sizes: list[int | None] = [None, *(size for size in shortlist_sizes(vocab_size) if size in priced)]
    lists = {size: most_frequent(top, vocab_size, size) for size in sizes if size is not None}
    best = dict.fromkeys(sizes, -np.inf)
    for block, head in heads.items():
        data = select(block).rows(slice(0, MOST_TOKENS))
        found = _features(head, data, lists, project)
        for size in sizes:
            saving = _saving(*found[size], block + 1, blocks, costs.with_shortlist(size), targets)
            best[size] = max(best[size], saving)
        advance(data.tokens)
    most = max(best.values())
    by_size = (*sizes[1:], None)  # ascending: the whole vocabulary last
    kept = next(size for size in by_size if most - best[size] <= WORTH)
    return ShortlistChoice(None if kept is None else lists[kept], tuple(best.items()))


def planned_shortlist_tokens(exits: int, select: int) -> int:
    """Tokens that `choose_shortlist` looks at, behind so many exits and with so many in the select split."""
    return exits * min(select, MOST_TOKENS)


def _features(
    head: TrainedHead,
    data: Labelled,
    lists: Mapping[int, Shortlist],
    project: Project,
) -> dict[int | None, tuple[Tensor, Tensor]]:
    """By size, the log-odds and the margin [T, 2] of the logits that decide, and whether all logits agree [T]."""
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
    return {size: (torch.cat(own), truth) for size, own in parts.items()}


def _saving(
    features: Tensor, agrees: Tensor, depth: int, blocks: int, costs: ExitCosts, targets: Sequence[float]
) -> float:
    """The share of the blocks that an exit alone saves at `targets`, net, every token being looked at."""
    sure = confidence_of(features, logistic_regression(features, agrees)).double().cpu().numpy()
    truth = agrees.cpu().numpy()
    gains = []
    for target in targets:
        leaving = share_within(sure, truth, target)
        saved = leaving * ((blocks - depth) * (1.0 - costs.skipped_kv) - costs.leaving)
        gains.append((saved - costs.gate - (1.0 - leaving) * costs.projection) / blocks)
    return float(np.mean(gains))
