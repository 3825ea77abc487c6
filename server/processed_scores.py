"""The scores that tokens are drawn from: steps 1, 2, 4 and 5 of `server/sampling.py`."""

from collections.abc import Collection, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.host_memory import sent
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.token_draw import penalise_scores, truncate_scores
from exeunt.server.request import SamplingParams
from exeunt.server.row_sampling import RowSampling, truncates

# Top-p adds probabilities up as integers of this unit: sums that no order of adding changes.
_MASS_UNITS: Final = 1 << 40
_LEVEL_SHIFT: Final = 18  # a float32's exponent and its first five mantissa bits: 32 levels per power of two
_LEVELS: Final = 1 << (30 - _LEVEL_SHIFT)  # enough for every float up to 1
# Vocabulary entries cut by top-k and top-p at a time on a CPU: they stay in its cache, and each step on one thread.
_CPU_CHUNK: Final = 1 << 15


def processed_scores(
    logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int] = ()
) -> Tensor:
    """Steps 1, 2, 4 and 5: the scores [rows, vocabulary] of which softmax(score / temperature) is drawn from.

    What top-k and top-p rule out is -infinity; rows that ask for nothing stay as they are, and `logits` itself comes
    back where none does. `logits` are float32.
    """
    scores = _penalised(logits, rows, eos_token_ids)
    cut = [i for i, row in enumerate(rows) if not row.greedy and truncates(row.params, logits.shape[1])]
    if not cut:
        return scores
    if triton_runs(scores.device):
        return _truncated_on_gpu(scores, rows)
    if scores is logits:
        scores = logits.clone()
    together = len(cut) if scores.device.type != "cpu" else max(_CPU_CHUNK // scores.shape[1], 1)
    for start in range(0, len(cut), together):
        some = cut[start : start + together]
        index = _index(some, scores)
        part = scores.index_select(0, index)
        kept = _truncated_softmax(part, [rows[i].params for i in some]) > 0
        scores.index_copy_(0, index, part.masked_fill_(~kept, -torch.inf))
    return scores


def _penalised(logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int]) -> Tensor:
    """Steps 1 and 2; `logits` itself when no row asks for them."""
    masked = [index for index, row in enumerate(rows) if row.masks_eos()] if eos_token_ids else []
    penalised = [
        index for index, row in enumerate(rows) if row.params.repetition_penalty != 1.0 and len(row.history)
    ]
    if not masked and not penalised:
        return logits
    if triton_runs(logits.device):
        return _penalised_on_gpu(logits, rows, eos_token_ids)
    scores = logits.clone()
    if masked:
        eos = _index(list(eos_token_ids), scores)
        scores[_index(masked, scores)[:, None], eos] = -torch.inf
    if penalised:
        row_ids, token_ids = _seen(rows, penalised, scores.device)
        strength = torch.tensor([row.params.repetition_penalty for row in rows], device=scores.device)[
            row_ids
        ]
        values = scores[row_ids, token_ids]
        # A token that was seen twice is written twice, with the same value: both come from the score as it was.
        scores[row_ids, token_ids] = torch.where(values < 0, values * strength, values / strength)
    return scores


def _penalised_on_gpu(logits: Tensor, rows: Sequence[RowSampling], eos_token_ids: Collection[int]) -> Tensor:
    """Steps 1 and 2 in one kernel, which nothing waits for."""
    seen = [row.history if row.params.repetition_penalty != 1.0 else () for row in rows]
    lengths = [len(history) for history in seen]
    ids = [_ids(history) for history in seen]
    device = logits.device
    return penalise_scores(
        logits,
        sent(np.concatenate(ids), device),
        sent(np.cumsum([0, *lengths], dtype=np.int32), device),
        sent(np.array([row.params.repetition_penalty for row in rows], np.float32), device),
        sent(np.fromiter(eos_token_ids, np.int32, len(eos_token_ids)), device),
        sent(np.array([row.masks_eos() for row in rows], np.bool_), device),
    )


def _truncated_on_gpu(scores: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """Steps 3 to 5 without sorting, in kernels that nothing waits for."""
    device, vocab_size = scores.device, scores.shape[1]
    return truncate_scores(
        scores,
        sent(np.array([0.0 if row.greedy else row.params.temperature for row in rows], np.float32), device),
        sent(np.array([min(row.params.top_k, vocab_size) for row in rows], np.int32), device),
        sent(np.array([row.params.top_p for row in rows], np.float64), device),
    )


def _seen(rows: Sequence[RowSampling], penalised: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, token id) of every token in the histories of the rows `penalised`."""
    histories = [rows[index].history for index in penalised]
    lengths = [len(history) for history in histories]
    ids = np.concatenate([_ids(history) for history in histories])
    return torch.from_numpy(np.repeat(penalised, lengths)).to(device), torch.from_numpy(
        ids.astype(np.int64)
    ).to(device)


def _ids(history: Collection[int] | np.ndarray) -> np.ndarray:
    """The ids as int32, without a copy where they are such an array."""
    if isinstance(history, np.ndarray):
        return history.astype(np.int32, copy=False)
    return np.fromiter(history, np.int32, len(history))


def _truncated_softmax(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Steps 3 to 5: [rows, vocab] float32, a new tensor, each row summing to at most 1 (truncated, not
    rescaled).

    The scale of a row changes no draw, so the mass that top-p cut off is not redistributed.
    """
    temperatures = torch.tensor([p.temperature for p in params], device=scores.device)[:, None]
    # Subtracting the maximum first keeps a small temperature from overflowing.
    scaled = (scores - scores.amax(dim=-1, keepdim=True)).div_(temperatures)
    vocab_size = scores.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in params]
    if any(limits):
        index = _index([i for i, limit in enumerate(limits) if limit], scores)
        ks = _index([limit for limit in limits if limit], scores)[:, None]
        rows = scaled.index_select(0, index)
        kth = rows.topk(max(limits), dim=-1).values.gather(1, ks - 1)
        scaled.index_copy_(0, index, rows.masked_fill_(rows < kth, -torch.inf))
    probs = scaled.softmax(dim=-1)
    nuclei = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if nuclei:
        index = _index(nuclei, scores)
        mass = torch.tensor([params[i].top_p for i in nuclei], dtype=torch.float64, device=scores.device)[
            :, None
        ]
        probs.index_copy_(0, index, _nucleus(probs.index_select(0, index), mass))
    return probs


def _nucleus(probs: Tensor, mass: Tensor) -> Tensor:
    """Step 5: `probs` [rows, vocab] with zeros outside each row's nucleus of `mass` [rows, 1] float64.

    Sorting a vocabulary costs more than the rest of sampling together. A histogram over levels of probability finds
    the level in which the nucleus ends; all above is in it, all below is not, and only that level is sorted.
    """
    probs = probs.nan_to_num(0.0)  # an unusable row fails by itself, not the batch by an index out of bounds
    units = (probs.double() * _MASS_UNITS).long()
    wanted = (mass * _MASS_UNITS).ceil().long().clamp_min_(1)
    # The bits of positive floats are ordered as the floats are.
    levels = (probs.view(torch.int32) >> _LEVEL_SHIFT).long()
    by_level = units.new_zeros(probs.shape[0], _LEVELS + 1).scatter_add_(1, levels, units)
    reached = by_level.flip(1).cumsum(dim=1).flip(1)  # [rows, levels]: mass at a level and above
    border = ((reached >= wanted).sum(dim=1, keepdim=True) - 1).clamp_min_(0)
    above = reached.gather(1, border + 1)
    inside = levels > border
    rows, ids = (levels == border).nonzero().unbind(1)
    order = probs[rows, ids].sort(descending=True, stable=True).indices  # ties stay in the order of their ids
    order = order[rows[order].sort(stable=True).indices]
    rows, ids = rows[order], ids[order]
    weights = units[rows, ids]
    before = weights.cumsum(dim=0) - weights
    counts = rows.bincount(minlength=probs.shape[0])
    first = (counts.cumsum(dim=0) - counts)[rows]
    stays = above[rows, 0] + before - before[first] < wanted[rows, 0]
    inside[rows[stays], ids[stays]] = True
    return probs * inside


def _index(values: list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)
