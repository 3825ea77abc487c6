"""Which thresholds are worth testing for the NLL increase: planned on the select split, as `thresholds` does for
disagreement.

This risk is zero where nothing leaves and grows with what does, so its sequences begin at a fraction of the exit rate
that looks just safe. Where keys and values are backfilled a test costs no pass, and there may be many. Where they are
propagated each is a pass to the end, and costs more than the select split's full-depth states show, for later tokens
attend to what was projected: there are few, and they begin lower.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.calibration.exit_training import Labelled
from exeunt.calibration.nll_risk import NllCounts, forecast_bound
from exeunt.calibration.risk import CONFIDENCE, LEAST_BLOCKS
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.calibration.thresholds import (
    FORECASTS,
    LEAST_SHARE,
    SAME,
    GateView,
    NllPlan,
    Steps,
    distinct_shares,
    threshold_at,
)
from exeunt.calibration.token_losses import TokenLosses, exit_nll, nll_of
from exeunt.compression.exits import ExitHead

BACKFILL_STEPS: Final = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1)
"""Exit shares tried for a target, over the largest that looks safe for it, where a test costs no pass."""
PROPAGATE_STEPS: Final = (0.5, 0.8)
"""The same where it costs one. Propagated keys and values make text less likely by a fifth to a half more."""
_SAME_WITHOUT_PASS: Final = 0.97
_ROOM: Final = 1.5
"""Blocks of text with an exit that are expected where a sequence begins, over those without which nothing is tested."""
_LOOSEST: Final = 0.6  # of the tokens leaving: no target of a few hundredths of a nat allows more


def select_losses(
    model: ForcedModel,
    exits: Sequence[ExitHead],
    states: Sequence[Labelled],
    final: Tensor,
    rows: Sequence[Tensor],
    view: GateView,
) -> TokenLosses:
    """The losses of the tokens of `rows` from full-depth `states` behind each of `exits` and `final` [T, H].

    At exits those of the tokens that may leave there when most are let go. `view` is that of the same exits.
    """
    device, decoder = model.decoder.device, model.decoder
    following = torch.cat([row.roll(-1) for row in rows])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    following[ends] = -1
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    scored = (positions > 0) & (following >= 0)
    full = torch.zeros(len(following))

    def note(_: int, tokens: Tensor, logits: Tensor) -> None:
        full[tokens.cpu()] = nll_of(logits, following[tokens.cpu()].to(device)).cpu()

    for start in range(0, len(following), 4096):
        part = torch.arange(start, min(start + 4096, len(following)))
        model.final(final[part].to(device), part.to(device), note)
    least = threshold_at(view.best, _LOOSEST)
    at_exits = torch.zeros(len(exits), len(following))
    for place, (head, data) in enumerate(zip(exits, states, strict=True)):
        asked = torch.from_numpy(view.reach[place] >= least) & scored
        at_exits[place, asked] = exit_nll(
            head,
            data.hidden[asked].to(device),
            following[asked].to(device),
            decoder.project_exit,
            decoder.spec.vocab_size,
        ).cpu()
    return TokenLosses(at_exits.double().numpy(), full.double().numpy(), scored.numpy())


def plan_nll(
    view: GateView,
    losses: TokenLosses,
    targets: Sequence[float],
    certify_tokens: int,
    confidence: float = CONFIDENCE,
    beside: Sequence[float] = (),
    every: int = 1,
) -> NllPlan | None:
    """What to test for `targets`, in nats per token, on a held-out split of `certify_tokens` tokens; None without any.

    With propagate each `every`-th batch of it is read. No sequence begins where too few blocks of text would have an
    exit to be tested at all, unless nothing looser looks safe. `beside` are thresholds that are passes with propagated
    keys and values anyway: those near a wanted one replace it.
    """
    if not targets:
        return None
    best = view.best
    grid = np.geomspace(_LOOSEST, LEAST_SHARE, FORECASTS)[::-1]  # exit shares, ascending: strict to loose
    growth = certify_tokens / view.reach.shape[1]
    seen = [_counts(view, losses, threshold_at(best, float(share))) for share in grid]
    bounds = [forecast_bound(counts, growth, confidence) for counts in seen]
    blocks = [
        int((counts.exits > 0).sum()) * growth for counts in seen
    ]  # with an exit, that are to be expected
    loosest = {target: _loosest(grid.tolist(), bounds, target) for target in targets}
    passes = {float((best >= threshold).mean()): threshold for threshold in beside}
    return NllPlan(
        _steps(view, loosest, BACKFILL_STEPS, _SAME_WITHOUT_PASS, {}, _least(grid.tolist(), blocks)),
        _steps(view, loosest, PROPAGATE_STEPS, SAME, passes, _least(grid.tolist(), blocks, every)),
    )


def _least(shares: Sequence[float], blocks: Sequence[float], every: int = 1) -> float:
    """The smallest exit share at which blocks enough are to be expected in an `every`-th part, 1 where none is."""
    enough = (
        share for share, count in zip(shares, blocks, strict=True) if count / every >= _ROOM * LEAST_BLOCKS
    )
    return next(enough, 1.0)


def _counts(view: GateView, losses: TokenLosses, threshold: float) -> NllCounts:
    exits = view.leave_at(threshold)
    return losses.counts(losses.left_at(exits), exits < len(view.reach), view.text_block, view.blocks)


def _loosest(shares: Sequence[float], bounds: Sequence[float | None], target: float) -> float:
    """The largest exit share that looks safe; where none does, the one that comes nearest, or was seen most of."""
    safe = [
        share for share, bound in zip(shares, bounds, strict=True) if bound is not None and bound <= target
    ]
    if safe:
        return safe[-1]
    known = [(bound, share) for share, bound in zip(shares, bounds, strict=True) if bound is not None]
    return min(known)[1] if known else shares[-1]


def _steps(
    view: GateView,
    loosest: Mapping[float, float],
    steps: Sequence[float],
    same: float,
    passes: Mapping[float, float],
    least: float,
) -> Steps:
    """Thresholds at `steps` × each target's `loosest` exit share, and where each begins; `passes` by exit share.

    None is at a smaller share than `least`, or than the loosest one where that is smaller still.
    """
    best = view.best
    wanted = {
        target: [_near(min(max(step * share, min(least, share)), 0.95), passes, same) for step in steps]
        for target, share in loosest.items()
    }
    distinct = distinct_shares([share for several in wanted.values() for share in several], same)
    thresholds = [passes.get(share, threshold_at(best, share)) for share in distinct]
    begins = {
        target: thresholds[max(place for place, share in enumerate(distinct) if share <= min(several))]
        for target, several in wanted.items()
    }
    return Steps(tuple(sorted(set(thresholds), reverse=True)), begins)


def _near(share: float, passes: Mapping[float, float], same: float) -> float:
    """The share of a pass that is made anyway, where one is close and no larger; else `share`."""
    return max((each for each in passes if same * share < each <= share), default=share)
