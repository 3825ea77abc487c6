"""What a mode computes per token, in multiply-accumulates, and so what it saves of the full-depth model, net.

Counted are the matrix products (linears, attention at the token's position, output matrix) and the norms, at two
multiply-accumulates an element; rotations, activations and softmax are not. An INT4 weight counts as any other: what
INT4 saves is bytes. The counts follow from the model's shape alone, so they are the same on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.compression.architecture import Architecture
from exeunt.compression.exits import ExitHead, ExitJudge
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.variant import SkippedKV

NORM: Final = 2
"""Multiply-accumulates of a norm for each element: one for the sum of squares, one to scale."""

COUNTED_CONTEXT: Final = 256
"""Tokens that one has behind it where what a block takes is one number; as where costs are measured."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Passage:
    """How tokens [T] went through a model with E exits: what they are charged for.

    `left` is the exit at which each left, E where it stayed. `asked`, `looked` and `whole` [E, T] say whether an
    exit's gate was asked about a token, whether it looked at its logits, in vain or not, and whether at all of them.
    """

    positions: Integers  # [T], from 0 in its row
    left: Integers  # [T]
    asked: NDArray[np.bool_]  # [E, T]
    looked: NDArray[np.bool_]  # [E, T]
    whole: NDArray[np.bool_]  # [E, T]


class ComputeCost:
    """Multiply-accumulates of a model of some shape with some exits, and perhaps a linear block."""

    def __init__(
        self, spec: Architecture, exits: Sequence[ExitHead] = (), linear_block: LinearBlock | None = None
    ) -> None:
        """`exits` are the ones whose gates are asked, shallowest first."""
        self._spec, self._exits = spec, tuple(exits)
        self._depths = np.array([*(head.depth for head in exits), spec.blocks])
        self._linears = _before([_block_linears(spec, linear_block, b) for b in range(spec.blocks)])
        attending = [linear_block is None or linear_block.index != block for block in range(spec.blocks)]
        self._windows = {
            window: _before([float(a and w == window) for a, w in zip(attending, spec.windows, strict=True)])
            for window in set(spec.windows)
        }
        kv = spec.hidden_size * 2 * spec.kv_size + NORM * spec.hidden_size
        self._kv = _before([kv * float(attends) for attends in attending])
        self._asked = np.array([asked_cost(head) for head in exits], np.float64)
        self._looked = np.array([looked_cost(head, spec) for head in exits], np.float64)
        self._whole = np.array([whole_cost(head, spec) for head in exits], np.float64)

    @property
    def head(self) -> float:
        """Of the model's own head for one token: final norm and output matrix."""
        return float(self._spec.hidden_size * (NORM + self._spec.vocab_size))

    @property
    def skipped_kv(self) -> float:
        """Of the keys and values of all blocks for one token."""
        return float(self._kv[self._spec.blocks])

    def blocks(self, positions: Integers, depths: Integers | int) -> Floats:
        """Of the first `depths` blocks for tokens at `positions` [T], attending to themselves and all before."""
        attention = 2.0 * self._spec.query_size  # scores, and the weighted sum of values
        total = self._linears[depths] + np.zeros(len(positions))
        for window, attending in self._windows.items():
            context = positions + 1 if window is None else np.minimum(positions + 1, window)
            total += attending[depths] * attention * context
        return total

    def full_depth(self, positions: Integers) -> Floats:
        """Of all blocks and the head, for tokens at `positions` [T]: what `saved` is measured against."""
        return self.blocks(positions, self._spec.blocks) + self.head

    def done(self, passage: Passage, skipped_kv: SkippedKV) -> Floats:
        """Of everything done for each token of `passage` [T], exits' own costs included.

        With backfill the blocks behind an exit are computed too, later: what exits save then are passes.
        """
        depths = self._depths[passage.left]
        through = depths if skipped_kv == "propagate" else np.full_like(depths, self._spec.blocks)
        done = self.blocks(passage.positions, through)
        if skipped_kv == "propagate":
            done += self._kv[self._spec.blocks] - self._kv[depths]
        done += np.where(passage.left == len(self._exits), self.head, 0.0)
        done += self._asked @ passage.asked + self._looked @ passage.looked
        return done + self._whole @ passage.whole


def counted_costs(spec: Architecture, units: int, tops: int, sizes: Sequence[int]) -> ExitCosts:
    """What exits cost by multiply-accumulates, in units of one block's at `COUNTED_CONTEXT`: the same on every machine.

    Of gates whose probe has so many `units` and whose judges see the largest `tops` log-probabilities, with shortlists
    of `sizes`.
    """
    cost, position = ComputeCost(spec), min(COUNTED_CONTEXT, spec.max_position_embeddings) - 1
    block = float(cost.blocks(np.array([position]), spec.blocks)[0]) / spec.blocks
    hidden, judge = spec.hidden_size, (tops + 1) * units
    return ExitCosts(
        gate=_asked(units, hidden) / block,
        projection=(hidden * spec.vocab_size + judge) / block,
        skipped_kv=cost.skipped_kv / spec.blocks / block,
        looks=tuple((size, (hidden * size + judge) / block) for size in sizes),
    )


def asked_cost(head: ExitHead) -> float:
    """Multiply-accumulates of a gate that is asked about one token: norm, adapter and probe."""
    units, hidden = head.probe.hidden_weight.shape
    return _asked(units, hidden)


def _asked(units: int, hidden: int) -> float:
    return float(NORM * hidden + hidden * hidden + units * hidden + units)


def looked_cost(head: ExitHead, spec: Architecture) -> float:
    """Multiply-accumulates of an exit's look at one token: at its shortlist, or at the vocabulary; and of its judge."""
    looked_at = spec.vocab_size if head.shortlist is None else len(head.shortlist)
    judge = 0 if head.judge is None else _judge_cost(head.judge)
    return float(head.adapter.shape[0] * looked_at + judge)


def whole_cost(head: ExitHead, spec: Architecture) -> float:
    """Multiply-accumulates of the vocabulary for one token, where the look was not at it; and of who then confirms."""
    if head.shortlist is None:
        return 0.0
    judge = 0 if head.confirmation is None else _judge_cost(head.confirmation.judge)
    return float(head.adapter.shape[0] * spec.vocab_size + judge)


def _judge_cost(judge: ExitJudge) -> int:
    return judge.top_weight.numel() + judge.output_weight.numel()


def _block_linears(spec: Architecture, linear_block: LinearBlock | None, block: int) -> float:
    """One block's matrix products but for attention, and its norms, for one token."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    if linear_block is not None and linear_block.index == block:
        return 2.0 * hidden * linear_block.rank
    attention = hidden * (spec.query_size + 2 * spec.kv_size) + spec.query_size * hidden
    heads = NORM * (spec.query_size + spec.kv_size) if spec.qk_norm else 0
    return float(attention + (3 if spec.gated else 2) * hidden * inner + 2 * NORM * hidden + heads)


def _before(costs: Sequence[float]) -> Floats:
    """[blocks + 1]: the sum of the first b `costs`."""
    return np.concatenate([[0.0], np.cumsum(costs)])
