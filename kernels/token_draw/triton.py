"""Drawing tokens on a GPU: each chunk of a row's vocabulary by a program of its own, then one program a row.

Chunks have one size whatever the call, so that a row's token and log-probability do not depend on the rows beside it.
The noise is the reference's to the bit: the same integer hash, and its logarithm in float64 rounded to float32.
"""

# Kernels are written in Triton's language: their arguments have no Python types, and compile-time ones are upper case.
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# ruff: noqa: N803

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK: Final = 1024
"""Tokens of the vocabulary that one program looks at."""

_WARPS: Final = 4
_VECTOR_BYTES: Final = 16
_FEWEST_LANES: Final = 32


@triton.jit
def _hashed(token_keys, first_key, second_key):
    """The reference's hash; int32 shifts drag the sign along, the masks make them logical."""
    bits = token_keys ^ first_key
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = tl.mul(bits, 0x21F0AAAD, sanitize_overflow=False)
    bits = tl.add(bits, second_key, sanitize_overflow=False)
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = tl.mul(bits, 0x735A2D97, sanitize_overflow=False)
    return bits ^ ((bits >> 15) & 0x1FFFF)


@triton.jit
def _noise(token_keys, first_key, second_key):
    """Standard exponential noise, float32."""
    bits = _hashed(token_keys, first_key, second_key)
    uniform = (
        bits.to(tl.float64) + 2147483648.0 + 0.5
    ) * 2.3283064365386963e-10  # exact: 2^31, 1/2 and 2^-32
    return (-tl.log(uniform)).to(tl.float32)


@triton.jit
def _draw_chunks(
    tops, chosen, faults, logits, scores, temperatures, keys, token_keys, vocab, chunks, CHUNK: tl.constexpr
):
    """Of each chunk: its highest score, logit and sum of exp(logit - highest), and the best token with its value."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    raw = tl.load(logits + row * vocab + at, mask=inside, other=-float("inf"))
    score = tl.load(scores + row * vocab + at, mask=inside, other=-float("inf"))
    fault = (raw != raw) | (raw == float("inf")) | (score != score) | (score == float("inf"))
    raw = tl.where(fault, -float("inf"), raw)
    score = tl.where(fault, -float("inf"), score)
    temperature = tl.load(temperatures + row)

    raw_top = tl.max(raw, axis=0)
    raw_sum = tl.sum(tl.exp(raw - tl.where(raw_top > -float("inf"), raw_top, 0.0)), axis=0)
    top = tl.max(score, axis=0)
    distance = score - tl.where(top > -float("inf"), top, 0.0)
    weight = tl.exp(tl.math.div_rn(distance, tl.where(temperature > 0, temperature, 1.0)))
    token_key = tl.load(token_keys + at, mask=inside, other=0)
    noise = _noise(token_key, tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1))
    value = tl.where(temperature > 0, tl.math.div_rn(weight, noise), score)
    value = tl.where(inside, value, -float("inf"))
    best = tl.max(value, axis=0)
    token = tl.min(tl.where((value == best) & inside, at, vocab), axis=0)

    place = row * chunks + chunk
    tl.store(tops + 4 * place, top)
    tl.store(tops + 4 * place + 1, raw_top)
    tl.store(tops + 4 * place + 2, raw_sum)
    tl.store(tops + 4 * place + 3, best)
    tl.store(chosen + place, token)
    tl.store(faults + place, tl.max(fault.to(tl.int32), axis=0))


@triton.jit
def _draw_rows(
    ids, logprobs, tops, chosen, faults, logits, scores, temperatures, vocab, chunks, CHUNKS: tl.constexpr
):
    """Of each row: the best of its chunks' tokens, the lowest among equals, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHUNKS)
    inside = lanes < chunks
    place = row * chunks + lanes
    top = tl.load(tops + 4 * place, mask=inside, other=-float("inf"))
    raw_top = tl.load(tops + 4 * place + 1, mask=inside, other=-float("inf"))
    raw_sum = tl.load(tops + 4 * place + 2, mask=inside, other=0.0)
    best = tl.load(tops + 4 * place + 3, mask=inside, other=-float("inf"))
    token = tl.load(chosen + place, mask=inside, other=vocab)
    fault = tl.max(tl.load(faults + place, mask=inside, other=0), axis=0)
    temperature = tl.load(temperatures + row)

    highest = tl.max(top, axis=0)
    base = tl.where(highest > -float("inf"), highest, 0.0)
    # chunks weighed their tokens by their own highest score: from there to the row's
    scale = tl.exp(tl.math.div_rn(top - base, tl.where(temperature > 0, temperature, 1.0)))
    value = tl.where(temperature > 0, best * scale, best)
    value = tl.where(inside, value, -float("inf"))
    winner = tl.min(tl.where((value == tl.max(value, axis=0)) & inside, token, vocab - 1), axis=0)

    raw_highest = tl.max(raw_top, axis=0)
    raw_base = tl.where(raw_highest > -float("inf"), raw_highest, 0.0)
    total = tl.sum(raw_sum * tl.exp(raw_top - raw_base), axis=0)
    logit = tl.load(logits + row * vocab + winner)
    score = tl.load(scores + row * vocab + winner)
    usable = (fault == 0) & (highest > -float("inf")) & (score > -float("inf"))
    # one after the other: their sum would round, by as much as a constant added to the whole row says
    logprob = (logit - raw_base) - tl.log(total)
    tl.store(ids + row, winner.to(tl.int64))
    tl.store(logprobs + row, tl.where(usable, logprob, float("nan")))


def draw_tokens_triton(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `draw_tokens` returns: ids [rows] int64 and log-probabilities [rows] float32.

    Its arguments are those, with shapes and dtypes already checked. An id is one of the vocabulary also where the row
    is not usable.
    """
    drawn: tuple[Tensor, Tensor] = _draw_op(logits, scores, temperatures, keys, token_keys)
    return drawn


@torch.library.custom_op("exeunt::draw_tokens", mutates_args=())
def _draw_op(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    (rows, vocab), device = logits.shape, logits.device
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if rows == 0:
        return ids, logprobs
    chunks = triton.cdiv(vocab, CHUNK)
    tops = torch.empty((rows, chunks, 4), dtype=torch.float32, device=device)
    chosen = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    faults = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    logits, scores, temperatures = aligned(logits), aligned(scores), temperatures.contiguous()
    _draw_chunks[(rows, chunks)](
        tops,
        chosen,
        faults,
        logits,
        scores,
        temperatures,
        keys.contiguous(),
        aligned(token_keys),
        vocab,
        chunks,
        CHUNK=CHUNK,
        num_warps=_WARPS,
        num_stages=1,
    )
    _draw_rows[(rows,)](
        ids,
        logprobs,
        tops,
        chosen,
        faults,
        logits,
        scores,
        temperatures,
        vocab,
        chunks,
        CHUNKS=lanes_for(chunks),
        num_warps=_WARPS,
        num_stages=1,
    )
    return ids, logprobs


@_draw_op.register_fake
def _(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)


def lanes_for(values: int) -> int:
    """Lanes of a block that holds as many values: a power of two, and not so few that compilers fail at it."""
    lanes: int = triton.next_power_of_2(max(values, _FEWEST_LANES))
    return lanes


def aligned(rows: Tensor) -> Tensor:
    """The same values dense and where vectors can be read.

    Triton chooses the width of loads, and with it the order of a sum, by the alignment of addresses: it must not
    depend on where in a larger tensor a row happens to lie.
    """
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % _VECTOR_BYTES else rows
