"""What of a row's scores is left to draw from: penalties, top-k and top-p, in the order that `server.sampling` states.

Triton on a GPU, without waiting for it; plain PyTorch elsewhere. On a CPU the server has quicker ways of its own.
"""

from typing import Final

import torch
from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs

MASS_UNITS: Final = 1 << 40
"""Top-p adds probabilities up as integers of this unit: sums that no order of adding changes."""


def penalise_scores(
    logits: Tensor, history: Tensor, starts: Tensor, penalties: Tensor, eos_ids: Tensor, masks_eos: Tensor
) -> Tensor:
    """Return a copy of logits [rows, vocab] float32 with repeated tokens penalised and end-of-text ruled out.

    Row r has seen the tokens history[starts[r] : starts[r + 1]], `history` [n] and `starts` [rows + 1] int32, in any
    order and any number of times: its `penalties` [rows] float32, 1 for none, divide their positive logits and multiply
    the others. Where `masks_eos` [rows] bool says so, `eos_ids` [ends] int32 are -infinity. Ids outside the vocabulary
    are passed over on a GPU and an error elsewhere. Raises ValueError for other shapes and for tensors of several
    devices, TypeError for other dtypes.
    """
    rows = logits.shape[0]
    _check(
        logits, {"starts": (starts, rows + 1), "penalties": (penalties, rows), "masks_eos": (masks_eos, rows)}
    )
    _check_integers({"history": history, "starts": starts, "eos_ids": eos_ids})
    if penalties.dtype != torch.float32 or masks_eos.dtype != torch.bool:
        raise TypeError(
            f"penalties are {penalties.dtype} and masks_eos {masks_eos.dtype}, expected float32 and bool"
        )
    check_one_device(
        "logits, history, starts, penalties, eos_ids and masks_eos",
        *(logits, history, starts, penalties, eos_ids, masks_eos),
    )
    if triton_runs(logits.device):
        from exeunt.kernels.token_draw.scores_triton import (
            penalise_scores_triton,
        )  # Triton is there only with a GPU

        return penalise_scores_triton(logits, history, starts, penalties, eos_ids, masks_eos)
    return penalise_scores_reference(logits, history, starts, penalties, eos_ids, masks_eos)


def truncate_scores(scores: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return a copy of scores [rows, vocab] float32 with -infinity for what top-k and top-p rule out.

    `top_k` [rows] int32: tokens below the k-th largest score / temperature go, ties with it stay; 0, or the vocabulary
    and more, is no limit. `top_p` [rows] float32 or float64: of the rest the most probable stay until their mass
    reaches it, at least one, the lower id first among equals; 1 is no limit. Tokens whose probability is 0 in float32
    go too. Rows without a limit, and those of temperature 0 in `temperatures` [rows] float32, stay as they are; of a
    row with a limit that holds NaN or +infinity nothing stays. Raises ValueError for other shapes and for tensors of
    several devices, TypeError for other dtypes.
    """
    rows = scores.shape[0]
    _check(scores, {"temperatures": (temperatures, rows), "top_k": (top_k, rows), "top_p": (top_p, rows)})
    _check_integers({"top_k": top_k})
    if temperatures.dtype != torch.float32 or top_p.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"temperatures are {temperatures.dtype} and top_p {top_p.dtype}, expected float32 and float"
        )
    check_one_device("scores, temperatures, top_k and top_p", scores, temperatures, top_k, top_p)
    if triton_runs(scores.device):
        from exeunt.kernels.token_draw.scores_triton import truncate_scores_triton

        return truncate_scores_triton(scores, temperatures, top_k, top_p)
    return truncate_scores_reference(scores, temperatures, top_k, top_p)


def penalise_scores_reference(
    logits: Tensor, history: Tensor, starts: Tensor, penalties: Tensor, eos_ids: Tensor, masks_eos: Tensor
) -> Tensor:
    """Return what `penalise_scores` returns."""
    scores = logits.clone()
    scores[:, eos_ids.long()] = scores[:, eos_ids.long()].masked_fill(masks_eos[:, None], -torch.inf)
    rows = torch.repeat_interleave(starts.diff().long())
    tokens = history[starts[0] : starts[-1]].long()
    values, strength = scores[rows, tokens], penalties[rows]
    penalised = torch.where(values < 0, values * strength, values / strength)
    # A token that was seen twice is written twice, with the same value: both come from the score as it was.
    scores[rows, tokens] = torch.where(strength == 1, values, penalised)
    return scores


def truncate_scores_reference(scores: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return what `truncate_scores` returns, by sorting."""
    vocab = scores.shape[1]
    asks_k, asks_p = (top_k > 0) & (top_k < vocab), top_p < 1
    asks = (temperatures > 0) & (asks_k | asks_p)
    divisor = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    scaled = (scores - scores.amax(dim=-1, keepdim=True)) / divisor
    last = torch.where(asks_k, top_k, vocab).long()[:, None] - 1
    least = scaled.sort(dim=-1, descending=True).values.gather(1, last)
    probs = scaled.masked_fill(scaled < least, -torch.inf).softmax(dim=-1)
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    units = (ordered.nan_to_num(0.0).double() * MASS_UNITS).long()
    wanted = (top_p.double() * MASS_UNITS).ceil().long().clamp_min(1)[:, None]
    inside = torch.empty_like(probs, dtype=torch.bool).scatter_(1, ids, units.cumsum(1) - units < wanted)
    kept = (probs > 0) & (inside | ~asks_p[:, None])
    return torch.where(kept | ~asks[:, None], scores, -torch.inf)


def _check(scores: Tensor, sized: dict[str, tuple[Tensor, int]]) -> None:
    """Raise ValueError or TypeError where scores are not [rows, vocab] float32 or a vector has another length."""
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores are {list(scores.shape)}, expected [rows, vocab]")
    if scores.dtype != torch.float32:
        raise TypeError(f"scores are {scores.dtype}, expected float32")
    for name, (tensor, length) in sized.items():
        if tensor.shape != (length,):
            raise ValueError(f"{name} is {list(tensor.shape)}, expected [{length}]")


def _check_integers(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise TypeError(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected a vector of int32")
