"""Penalties, top-k and top-p on a GPU, without sorting and without waiting for the device.

A row's limits are searched for by halving: the k-th largest score among the bits of all floats, the border of the
nucleus among the bits of the row's probabilities. What is counted and added up are integers, so that no order of adding
changes them; the one sum of floats goes over chunks of one size. A row's result does not depend on the others.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from exeunt.kernels.token_draw.triton import CHUNK, aligned, lanes_for

SEARCH_LANES: Final = 8192
"""Tokens that the one program which searches a row looks at together."""

_CHUNK_WARPS: Final = 4
_LANES_A_WARP: Final = 512  # in a search: 16 a thread
_HISTORY_LANES: Final = 1024


@triton.jit
def _ordered(x):
    """The bits of float32 values as int32 that are ordered as the floats are."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _units(probability):
    """Probabilities as whole numbers of 2^-40, cut off."""
    return (probability * 1099511627776.0).to(tl.int64)


@triton.jit
def _asks(temperatures, top_k, top_p, row, vocab):
    """Whether a row has a limit at all, and whether it has one for the number of its tokens and for their mass."""
    count = tl.load(top_k + row)
    asks_count = (count > 0) & (count < vocab)
    asks_mass = tl.load(top_p + row) < 1.0
    return (tl.load(temperatures + row) > 0) & (asks_count | asks_mass), asks_count, asks_mass


@triton.jit
def _highest_and_limit(tops, faults, kth, temperatures, row, chunks, CHUNKS: tl.constexpr):
    """Of a row: its highest score, how far below it (÷ temperature) a token may lie, and whether it is usable."""
    lanes = tl.arange(0, CHUNKS)
    inside = lanes < chunks
    highest = tl.max(tl.load(tops + row * chunks + lanes, mask=inside, other=-float("inf")), axis=0)
    fault = tl.max(tl.load(faults + row * chunks + lanes, mask=inside, other=0), axis=0)
    usable = (fault == 0) & (highest > -float("inf"))
    highest = tl.where(usable, highest, 0.0)
    temperature = tl.load(temperatures + row)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    return highest, tl.math.div_rn(highest - tl.load(kth + row), divisor), divisor, usable


@triton.jit
def _chunk_tops(tops, faults, scores, vocab, chunks, CHUNK: tl.constexpr):
    """Of each chunk: its highest score, and whether there is NaN or +infinity in it."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + row * vocab + at, mask=at < vocab, other=-float("inf"))
    fault = (score != score) | (score == float("inf"))
    tl.store(tops + row * chunks + chunk, tl.max(tl.where(fault, -float("inf"), score), axis=0))
    tl.store(faults + row * chunks + chunk, tl.max(fault.to(tl.int32), axis=0))


@triton.jit
def _kth_scores(
    kth,
    tops,
    faults,
    scores,
    temperatures,
    top_k,
    top_p,
    vocab,
    chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of each row that asks for its k best: the k-th largest score. -infinity for others."""
    row = tl.program_id(0).to(tl.int64)
    asks, asks_count, _ = _asks(temperatures, top_k, top_p, row, vocab)
    lanes = tl.arange(0, CHUNKS)
    inside_chunks = lanes < chunks
    highest = tl.max(tl.load(tops + row * chunks + lanes, mask=inside_chunks, other=-float("inf")), axis=0)
    fault = tl.max(tl.load(faults + row * chunks + lanes, mask=inside_chunks, other=0), axis=0)
    tl.store(kth + row, -float("inf"))
    if asks & asks_count & (fault == 0):
        wanted = tl.load(top_k + row)
        places = tl.arange(0, BLOCK)
        low = tl.full((), -2147483648, tl.int64)  # as many as are wanted are at this or above
        high = _ordered(highest).to(tl.int64)
        while low < high:
            middle = low + ((high - low + 1) >> 1)
            level = middle.to(tl.int32)
            counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, vocab, BLOCK):
                at = start + places
                inside = at < vocab
                score = tl.load(scores + row * vocab + at, mask=inside, other=-float("inf"))
                counts += ((_ordered(score) >= level) & inside).to(tl.int32)
            count = tl.sum(counts, axis=0)
            # exactly as many: nothing between this level and the k-th matters
            high = tl.where(count == wanted, middle, tl.where(count > wanted, high, middle - 1))
            low = tl.where(count >= wanted, middle, low)
        level = low.to(tl.int32)
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            at = start + places
            inside = at < vocab
            score = tl.load(scores + row * vocab + at, mask=inside, other=-float("inf"))
            least = tl.where((_ordered(score) >= level) & inside, tl.minimum(least, score), least)
        tl.store(kth + row, tl.min(least, axis=0))


@triton.jit
def _chunk_sums(
    sums, tops, faults, kth, scores, temperatures, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Of each chunk: the sum of exp((score - highest of the row) / temperature) over what top-k leaves."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    highest, limit, divisor, usable = _highest_and_limit(tops, faults, kth, temperatures, row, chunks, CHUNKS)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    score = tl.load(scores + row * vocab + at, mask=at < vocab, other=-float("inf"))
    distance = tl.math.div_rn(highest - score, divisor)
    weight = tl.where((distance <= limit) & usable, tl.exp(-distance), 0.0)
    tl.store(sums + row * chunks + chunk, tl.sum(weight, axis=0))


@triton.jit
def _chunk_probabilities(
    out,
    sums,
    tops,
    faults,
    kth,
    scores,
    temperatures,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The probabilities of what top-k leaves, into `out`."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    highest, limit, divisor, usable = _highest_and_limit(tops, faults, kth, temperatures, row, chunks, CHUNKS)
    lanes = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(sums + row * chunks + lanes, mask=lanes < chunks, other=0.0), axis=0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    score = tl.load(scores + row * vocab + at, mask=inside, other=-float("inf"))
    distance = tl.math.div_rn(highest - score, divisor)
    weight = tl.where((distance <= limit) & usable, tl.exp(-distance), 0.0)
    probability = tl.math.div_rn(weight, tl.where(usable, total, 1.0))
    tl.store(out + row * vocab + at, probability, mask=inside)


@triton.jit
def _nucleus_borders(borders, lasts, probabilities, temperatures, top_k, top_p, vocab, BLOCK: tl.constexpr):
    """Of each row that asks for a nucleus: the bits of the least probability in it, and the last id that has it."""
    row = tl.program_id(0).to(tl.int64)
    asks, _, asks_mass = _asks(temperatures, top_k, top_p, row, vocab)
    tl.store(borders + row, 0)
    tl.store(lasts + row, vocab)
    if asks & asks_mass:
        places = tl.arange(0, BLOCK)
        mass = tl.load(top_p + row).to(tl.float64) * 1099511627776.0
        wanted = tl.maximum(tl.ceil(mass).to(tl.int64), 1)
        # the border is the highest level at which and above which there is mass enough
        low = tl.full((), 0, tl.int64)
        high = tl.full((), 0x3F800000, tl.int64)
        at_low = tl.full((), 0, tl.int32) + vocab  # tokens at `low` and above
        above_high = tl.full((), 0, tl.int32)  # tokens above `high`, and their mass
        mass_above = tl.full((), 0, tl.int64)
        while (low < high) & (at_low - above_high > 1):
            middle = low + ((high - low + 1) >> 1)
            level = middle.to(tl.int32)
            counts = tl.zeros((BLOCK,), tl.int32)
            masses = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, vocab, BLOCK):
                at = start + places
                probability = tl.load(probabilities + row * vocab + at, mask=at < vocab, other=0.0)
                here = (
                    probability.to(tl.int32, bitcast=True) >= level
                )  # never in a lane past the end: level is above 0
                counts += here.to(tl.int32)
                masses += tl.where(here, _units(probability), 0)
            count = tl.sum(counts, axis=0)
            found = tl.sum(masses, axis=0)
            enough = found >= wanted
            low = tl.where(enough, middle, low)
            at_low = tl.where(enough, count, at_low)
            high = tl.where(enough, high, middle - 1)
            above_high = tl.where(enough, above_high, count)
            mass_above = tl.where(enough, mass_above, found)
        level = low.to(tl.int32)
        tl.store(borders + row, level)
        ties = at_low - above_high
        unit = _units(level.to(tl.float32, bitcast=True))
        needed = tl.maximum((wanted - mass_above + unit - 1) // tl.maximum(unit, 1), 1)
        if (low == high) & (unit > 0) & (needed < ties):
            # several tokens of that probability, and not all of them are needed: the lowest ids are
            before = tl.full((), 0, tl.int32)
            last = tl.full((), 0, tl.int32) + vocab
            for start in range(0, vocab, BLOCK):
                at = start + places
                probability = tl.load(probabilities + row * vocab + at, mask=at < vocab, other=-1.0)
                tied = (probability.to(tl.int32, bitcast=True) == level).to(tl.int32)
                number = before + tl.cumsum(tied, axis=0)
                last = tl.minimum(last, tl.min(tl.where((tied > 0) & (number == needed), at, vocab), axis=0))
                before += tl.sum(tied, axis=0)
            tl.store(lasts + row, last)


@triton.jit
def _cut(out, borders, lasts, scores, temperatures, top_k, top_p, vocab, CHUNK: tl.constexpr):
    """Scores, or -infinity for what goes, over the probabilities in `out`."""
    row = tl.program_id(0).to(tl.int64)
    asks, _, _ = _asks(temperatures, top_k, top_p, row, vocab)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    score = tl.load(scores + row * vocab + at, mask=inside, other=-float("inf"))
    probability = tl.load(out + row * vocab + at, mask=inside, other=0.0)
    bits = probability.to(tl.int32, bitcast=True)
    border = tl.load(borders + row)
    kept = (probability > 0) & ((bits > border) | ((bits == border) & (at <= tl.load(lasts + row))))
    tl.store(out + row * vocab + at, tl.where(kept | (asks == 0), score, -float("inf")), mask=inside)


@triton.jit
def _penalise(
    out,
    logits,
    history,
    starts,
    penalties,
    eos_ids,
    masks_eos,
    vocab,
    ends,
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Over a copy of the logits: what a row has seen penalised, end-of-text ruled out where that is asked for."""
    row = tl.program_id(0).to(tl.int64)
    penalty = tl.load(penalties + row)
    masks = tl.load(masks_eos + row) != 0
    lanes = tl.arange(0, BLOCK)
    if penalty != 1.0:
        stop = tl.load(starts + row + 1)
        for start in range(tl.load(starts + row), stop, BLOCK):
            seen = tl.load(history + start + lanes, mask=start + lanes < stop, other=-1)
            known = (seen >= 0) & (seen < vocab)
            logit = tl.load(logits + row * vocab + seen, mask=known, other=0.0)
            score = tl.where(logit < 0, logit * penalty, tl.math.div_rn(logit, penalty))
            for end in range(ends):
                score = tl.where(masks & (seen == tl.load(eos_ids + end)), -float("inf"), score)
            # a token that was seen twice is written twice, with the same value
            tl.store(out + row * vocab + seen, score, mask=known)
    if masks:
        places = tl.arange(0, ENDS)
        end = tl.load(eos_ids + places, mask=places < ends, other=-1)
        none = tl.full((ENDS,), -float("inf"), tl.float32)
        tl.store(out + row * vocab + end, none, mask=(end >= 0) & (end < vocab))


def truncate_scores_triton(scores: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return what `truncate_scores` returns; its arguments are those, with shapes and dtypes already checked."""
    cut: Tensor = _truncate_op(scores, temperatures, top_k, top_p)
    return cut


def penalise_scores_triton(
    logits: Tensor, history: Tensor, starts: Tensor, penalties: Tensor, eos_ids: Tensor, masks_eos: Tensor
) -> Tensor:
    """Return what `penalise_scores` returns; its arguments are those, with shapes and dtypes already checked."""
    scores: Tensor = _penalise_op(logits, history, starts, penalties, eos_ids, masks_eos)
    return scores


@torch.library.custom_op("exeunt::truncate_scores", mutates_args=())
def _truncate_op(scores: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    (rows, vocab), device = scores.shape, scores.device
    out = torch.empty((rows, vocab), dtype=torch.float32, device=device)
    if rows == 0:
        return out
    if vocab == 1:  # compilers fail at searches of one value; only what is not usable can go
        asks = (temperatures > 0) & (top_p < 1)
        return torch.where((scores.isnan() | scores.isposinf()) & asks[:, None], -torch.inf, scores)
    scores = aligned(scores)
    temperatures, top_k, top_p = temperatures.contiguous(), top_k.contiguous(), top_p.contiguous()
    chunks = triton.cdiv(vocab, CHUNK)
    # allocated one by one: where a row of them lies, and how it is read, must not depend on the number of rows
    tops = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    sums = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    faults = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    kth = torch.empty(rows, dtype=torch.float32, device=device)
    borders = torch.empty(rows, dtype=torch.int32, device=device)
    lasts = torch.empty(rows, dtype=torch.int32, device=device)
    grid, asked = (rows, chunks), (temperatures, top_k, top_p)
    wide = lanes_for(chunks)
    block = min(lanes_for(vocab), SEARCH_LANES)
    chunked = {"CHUNK": CHUNK, "num_warps": _CHUNK_WARPS, "num_stages": 1}
    search = {"BLOCK": block, "num_warps": max(block // _LANES_A_WARP, 4), "num_stages": 1}
    _chunk_tops[grid](tops, faults, scores, vocab, chunks, **chunked)
    _kth_scores[(rows,)](kth, tops, faults, scores, *asked, vocab, chunks, CHUNKS=wide, **search)
    row = (tops, faults, kth, scores, temperatures, vocab, chunks)
    _chunk_sums[grid](sums, *row, CHUNKS=wide, **chunked)
    _chunk_probabilities[grid](out, sums, *row, CHUNKS=wide, **chunked)
    _nucleus_borders[(rows,)](borders, lasts, out, *asked, vocab, **search)
    _cut[grid](out, borders, lasts, scores, *asked, vocab, **chunked)
    return out


@_truncate_op.register_fake
def _(scores: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("exeunt::penalise_scores", mutates_args=())
def _penalise_op(
    logits: Tensor, history: Tensor, starts: Tensor, penalties: Tensor, eos_ids: Tensor, masks_eos: Tensor
) -> Tensor:
    rows, vocab = logits.shape
    logits = logits.contiguous()
    out = logits.clone()
    if rows == 0:
        return out
    ends = eos_ids.shape[0]
    _penalise[(rows,)](
        out,
        logits,
        history.contiguous(),
        starts.contiguous(),
        penalties.contiguous(),
        eos_ids.contiguous(),
        masks_eos.contiguous().view(torch.int8),
        vocab,
        ends,
        BLOCK=_HISTORY_LANES,
        ENDS=lanes_for(ends),
        num_warps=_CHUNK_WARPS,
        num_stages=1,
    )
    return out


@_penalise_op.register_fake
def _(
    logits: Tensor, history: Tensor, starts: Tensor, penalties: Tensor, eos_ids: Tensor, masks_eos: Tensor
) -> Tensor:
    return logits.new_empty(logits.shape)
