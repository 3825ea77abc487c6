"""Behind which blocks exits are worth training: every block is looked at before any head is trained.

Two heads cost nothing to speak of, the model's own applied early and the ridge map in front of it. What the better of
them says on part of the select split, with its own top probability for a gate, shows the shape over depth of what
trained exits will do there: how often they agree, how well they know it, what leaving there would save at the risk
targets and how fast drafts from there would be, at measured costs. Only the best few are trained, and those that are
kept are chosen among them by their real gates.

The states behind all blocks are kept for that in the scratch files (`kept_blocks` says how many bytes, and thins the
blocks out where that is too much), and not in memory. The alternative, a second pass through the model once it is known
which blocks count, would take as long again as what takes longest with a large model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exeunt.calibration.drafting_choice import PassCosts, choose_drafting
from exeunt.calibration.exit_choice import ExitCosts, net_saving
from exeunt.calibration.exit_fit import ExitData, ridge_start
from exeunt.calibration.exit_training import Project, Start, head_sureness
from exeunt.calibration.gate_training import auc
from exeunt.calibration.selective import selective_agreement, share_within
from exeunt.calibration.sequence_batch import first_rows
from exeunt.calibration.thresholds import view_of
from exeunt.compression.exits import ExitNorm

STATE_BYTES: Final = 32 * 2**30
"""On the disk, for the states behind all blocks. A 7B model of 32 blocks (width 4096, bfloat16) takes 8 GB at 31,000
tokens of fit and select; a 70B one of 80 (width 8192) 40 GB, and keeps every second block."""
LEAST_PER_WEIGHT: Final = 2
"""Tokens, at least, for each input of a ridge map: with fewer it says more of them than of the model."""


@dataclass(frozen=True, slots=True)
class ScreenSize:
    """How much is looked at: tokens of the select split, and exits trained in the end."""

    tokens: int = 3_072
    trained: int = 4


@dataclass(frozen=True, slots=True)
class ScreenedExit:
    """What an untrained exit behind one block does. `saving` and `draft_speed` are before there is a gate.

    All but the two agreements are of the better start, as selective agreement has it.
    """

    block: int
    agreement: float  # of the model's own head applied here
    ridge_agreement: float
    start: Start
    selective: float
    separability: float  # AUC of its top probability: that an agreeing token gets more than another
    leaving: tuple[float, ...]  # share of the tokens that may leave at each risk
    saving: float  # share of the blocks, net, mean over the risks; negative where asking costs more than leaving saves
    draft_speed: float  # of one stream, over none drafted; 0 where nothing may draft
    trained: bool
    reason: str  # why it was trained; empty where it was not

    @property
    def depth(self) -> int:
        """Blocks passed by a token that leaves here."""
        return self.block + 1


@dataclass(frozen=True, slots=True)
class ExitScreen:
    """Every block that was looked at, shallowest first, on so many tokens of the select split."""

    exits: tuple[ScreenedExit, ...]
    tokens: int
    risks: tuple[float, ...]

    @property
    def trained(self) -> tuple[int, ...]:
        """The blocks behind which exits are to be trained, ascending."""
        return tuple(each.block for each in self.exits if each.trained)


def kept_blocks(
    blocks: int, tokens: int, hidden: int, itemsize: int, most: int = STATE_BYTES
) -> tuple[int, ...]:
    """The blocks whose states are kept for screening, of a model of `blocks`: all but the last that fit `most` bytes.

    Each takes `tokens` × `hidden` × `itemsize` bytes. Where not all fit, they are spread evenly, the last but one among
    them; there is at least one, in a model of more than one block.
    """
    last = blocks - 2
    if last < 0:
        return ()
    room = max(1, most // (tokens * hidden * itemsize))
    step = -(-(last + 1) // room)
    return tuple(sorted(range(last, -1, -step)))


def screen_exits(
    project: Project,
    norm: ExitNorm,
    data: ExitData,
    rows: Sequence[Tensor],
    blocks: int,
    costs: ExitCosts,
    passes: PassCosts | None,
    risks: Sequence[float],
    size: ScreenSize,
    named: Sequence[int] = (),
    *,
    certify: bool = True,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> ExitScreen:
    """Look at an exit behind each block of `data.states`, and say which are worth training.

    `project` is the deployed output matrix's, `norm` the model's final one, `rows` the select split's, `blocks` the
    model's. Trained are those `named` in any case, and then in turn the one that saves most, where `certify` says that
    exits are chosen to be certified, and the one that drafts fastest, where `passes` are given, up to `size.trained`.
    `advance` is told tokens that sum to `screen_work`.
    """
    judged = first_rows(rows, size.tokens)
    tokens = sum(map(len, judged))
    found = [_look(project, norm, data, block, tokens, size, advance) for block in sorted(data.states)]
    reach, agrees = np.stack([each.reach for each in found]), np.stack([each.agrees for each in found])
    view = view_of(reach, np.ones_like(reach), reach, agrees, judged)
    depths = [each.block + 1 for each in found]
    speeds = [0.0] * len(found)
    if passes is not None:
        speeds = [plan.speed for plan in choose_drafting(view, depths, passes).plans]
    savings, leaving = [], []
    for place, depth in enumerate(depths):
        one, may = view.only([place]), view.reach[place] >= 0
        sure, right = one.reach[0][may], one.agrees[0][may]
        shares = tuple(share_within(sure, right, risk) for risk in risks)
        leaving.append(shares)
        savings.append(
            float(
                np.mean([net_saving(one, _reach_at(sure, share), [depth], blocks, costs) for share in shares])
            )
        )
    reasons = _reasons(
        [each.block for each in found], savings if certify else None, speeds if passes else None, size
    )
    reasons |= dict.fromkeys(named, "named")
    exits = tuple(
        ScreenedExit(
            each.block,
            *each.agreements,
            each.start,
            each.selective,
            each.separability,
            share,
            saving,
            speed,
            each.block in reasons,
            reasons.get(each.block, ""),
        )
        for each, share, saving, speed in zip(found, leaving, savings, speeds, strict=True)
    )
    return ExitScreen(exits, tokens, tuple(risks))


def screen_work(data: ExitData, rows: Sequence[Tensor], size: ScreenSize) -> int:
    """The tokens that `screen_exits` looks at, once for each block."""
    judged = sum(map(len, first_rows(rows, size.tokens)))
    return len(data.states) * (judged + _ridge_tokens(data, size))


@dataclass(frozen=True, slots=True)
class _Look:
    """The better start behind one block, on [T] tokens."""

    block: int
    agreements: tuple[float, float]  # of the model's own head, of the ridge map
    start: Start
    selective: float
    separability: float
    reach: NDArray[np.float64]
    agrees: NDArray[np.bool_]


@torch.no_grad()
def _look(
    project: Project,
    norm: ExitNorm,
    data: ExitData,
    block: int,
    tokens: int,
    size: ScreenSize,
    advance: Callable[[int], None],
) -> _Look:
    ridge = ridge_start(norm, data, block, _ridge_tokens(data, size), advance)
    seen = data.select(block).rows(slice(0, tokens))
    looks = [head_sureness(norm, adapter, seen, project) for adapter in (torch.zeros_like(ridge), ridge)]
    advance(tokens)
    values = [selective_agreement(sure, agrees) for sure, agrees in looks]
    linear = values[1] > values[0]
    sure, agrees = looks[int(linear)]
    return _Look(
        block,
        (float(looks[0][1].mean()), float(looks[1][1].mean())),
        "ridge" if linear else "own head",
        max(values),
        auc(sure.astype(np.float64), agrees),
        np.exp(sure.astype(np.float64)),
        agrees,
    )


def _reach_at(reach: NDArray[np.float64], share: float) -> float:
    """The threshold at which the surest `share` of the tokens leave, infinity for none."""
    return float(np.sort(reach)[::-1][round(share * len(reach)) - 1]) if share > 0 else np.inf


def _reasons(
    blocks: Sequence[int], savings: Sequence[float] | None, speeds: Sequence[float] | None, size: ScreenSize
) -> dict[int, str]:
    """The blocks to train behind, and why: the best of each list in turn."""
    ranked = [
        (sorted(zip(values, blocks, strict=True), key=lambda pair: (-pair[0], pair[1])), why)
        for values, why in ((savings, "saving"), (speeds, "draft speed"))
        if values is not None
    ]
    reasons: dict[int, str] = {}
    for place in range(len(blocks)):
        for order, why in ranked:
            block = order[place][1]
            if block not in reasons and len(reasons) < size.trained:
                reasons[block] = f"{why}, place {place + 1}"
    return reasons


def _ridge_tokens(data: ExitData, size: ScreenSize) -> int:
    """Tokens of the fit split that the ridge maps are fitted on."""
    return min(data.head_tokens, max(size.tokens, LEAST_PER_WEIGHT * int(data.final.shape[1])))
