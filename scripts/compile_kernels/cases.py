"""What is compiled: calls of the kernels' wrappers at the shapes of a 7B model, over tensors without data.

Tiles and the like are the wrappers' own. A kernel's machine code depends on a call's dtypes, on which parts it has and
on what its sizes are divisible by; each case says one such choice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.triton import decide_triton, gate_confidence_triton, probe_logit_triton
from exeunt.kernels.full_linear.triton import full_linear_triton
from exeunt.kernels.int4_linear.ordered_triton import order_inputs
from exeunt.kernels.int4_linear.pairs import PairedInt4, pairs_of
from exeunt.kernels.int4_linear.triton import int4_linear_triton
from exeunt.kernels.paged_attention.triton import paged_attention_triton
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.rows.triton import layer_norm_triton, rms_norm_triton
from exeunt.kernels.token_draw.scores_triton import penalise_scores_triton, truncate_scores_triton
from exeunt.kernels.token_draw.triton import draw_tokens_triton
from exeunt.kernels.write_kv.triton import rotate_heads_triton, turn_and_write_kv_triton, write_kv_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
_HIDDEN, _INNER, _VOCAB = 4096, 14336, 32000
_HEADS, _KV_HEADS = 32, 8
_PAGE_TOKENS = {False: 16, True: 60}  # by whether pages are INT4


@dataclass(frozen=True, slots=True)
class Case:
    """One call; the kernels that it launches are compiled."""

    name: str
    call: Callable[[], object]
    tested: bool = False
    """Whether the normal test suite compiles it: one case of each kernel, or of each kind of its ways."""


def all_cases() -> list[Case]:
    """Every case, those that the test suite compiles first."""
    cases = [*_linears(), *_attention(), *_pages(), *_norms(), *_gates(), *_draws()]
    return sorted(cases, key=lambda case: not case.tested)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _linears() -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        for rows in (1, 12, 24, 64, 512) if dtype == BF16 else (1, 512):
            label = f"{_SHORT[dtype]}, {rows} row{'s' if rows > 1 else ''}"
            for group in (64, 32, 128) if dtype == BF16 else (64,):
                call = partial(_int4, dtype, rows, group, gated=False)
                tested = (dtype, group) == (BF16, 64) and rows == 1
                yield Case(f"int4 linear, {label}, groups of {group}, residual", call, tested)
            yield Case(f"full linear, {label}, residual", partial(_full, dtype, rows, gated=False))
            if dtype != FP16:
                gate = partial(_int4, dtype, rows, 64, gated=True)
                yield Case(
                    f"int4 linear, {label}, groups of 64, gate and up", gate, label == "bf16, 512 rows"
                )
                gate = partial(_full, dtype, rows, gated=True)
                yield Case(f"full linear, {label}, gate and up", gate, label == "bf16, 512 rows")
    yield Case("full linear, bf16, 1 row, bias and GELU", _biased)
    masked = partial(_int4, BF16, 1, 64, gated=False, masked=True)
    yield Case("int4 linear, bf16, 1 row, groups of 64, residual, masked", masked, True)
    masked = partial(_full, BF16, 1, gated=False, masked=True)
    yield Case("full linear, bf16, 1 row, residual, masked", masked, True)
    yield Case("inputs in order, bf16", _order, True)


def _linear_parts(
    dtype: torch.dtype, rows: int, gated: bool
) -> tuple[Tensor, Tensor | None, str | None, int]:
    """Input, residual, activation and outputs of a block's first or second half of a feed-forward network."""
    if gated:
        return _empty(rows, _HIDDEN, dtype=dtype), None, "silu", 2 * _INNER
    return _empty(rows, _INNER, dtype=dtype), _empty(rows, _HIDDEN, dtype=dtype), None, _HIDDEN


def _positions(rows: int, masked: bool) -> Tensor | None:
    return _empty(rows, dtype=torch.int64) if masked else None


def _int4(dtype: torch.dtype, rows: int, group: int, gated: bool, masked: bool = False) -> Tensor:
    x, residual, activation, outputs = _linear_parts(dtype, rows, gated)
    pairs = pairs_of(x.shape[1], group)
    codes = _empty(pairs, outputs, group, dtype=torch.uint8)
    weight = PairedInt4(codes, _empty(pairs, 2, outputs, dtype=torch.int32), group, x.shape[1], outputs)
    positions = _positions(rows, masked)
    return int4_linear_triton(
        x, weight, activation=activation, gated=gated, residual=residual, positions=positions
    )


def _full(dtype: torch.dtype, rows: int, gated: bool, masked: bool = False) -> Tensor:
    x, residual, activation, outputs = _linear_parts(dtype, rows, gated)
    weight = _empty(outputs, x.shape[1], dtype=dtype)
    positions = _positions(rows, masked)
    return full_linear_triton(
        x, weight, activation=activation, gated=gated, residual=residual, positions=positions
    )


def _biased() -> Tensor:
    x, weight = _empty(1, 768, dtype=BF16), _empty(3072, 768, dtype=BF16)
    return full_linear_triton(x, weight, _empty(3072, dtype=BF16), activation="gelu_new")


def _order() -> Tensor:
    return order_inputs(_empty(64, _HIDDEN, dtype=BF16), _HIDDEN // 64, 64, 64)


def _block(dtype: torch.dtype, int4: bool, head_dim: int) -> KVBlock:
    """A block's pages within larger ones that 31 other blocks share."""
    tokens = _PAGE_TOKENS[int4]

    def pages(width: int, kind: torch.dtype) -> Tensor:
        return _empty(64, 32, _KV_HEADS, tokens, width, dtype=kind)[:, 1]

    if not int4:
        return KVBlock(pages(head_dim, dtype), pages(head_dim, dtype))
    keys, values = (pages(head_dim // 2, torch.uint8) for _ in range(2))
    return KVBlock(keys, values, pages(2, FP16), pages(2, FP16))


def _batch(tokens: int, context: int) -> PagedBatch:
    numbers = _empty(tokens, dtype=torch.int64)
    starts = _empty(tokens + 1, dtype=torch.int32)
    return PagedBatch(numbers, numbers, starts, _empty(tokens, context // 16, dtype=torch.int32), context)


def _attention() -> Iterator[Case]:
    for dtype, head_dim, int4, context, window in (
        (BF16, 128, True, 4096, None),
        (BF16, 128, False, 4096, None),
        (BF16, 128, True, 512, None),
        (BF16, 128, False, 512, None),
        (BF16, 128, True, 4096, 4096),
        (BF16, 128, False, 4096, 4096),
        *((BF16, size, int4, 4096, None) for size in (64, 80, 96) for int4 in (False, True)),
        *((dtype, 128, int4, 4096, None) for dtype in (FP16, FP32) for int4 in (False, True)),
    ):
        kind = "INT4" if int4 else "full"
        how = "shared" if context > 512 else "folded"
        name = f"attention, {_SHORT[dtype]}, {kind} pages, heads of {head_dim}, splits {how}"
        name += ", window" if window else ""
        tested = (dtype, head_dim, context, window) == (BF16, 128, 4096, None)
        yield Case(name, partial(_attend, dtype, int4, head_dim, context, window), tested)


def _attend(dtype: torch.dtype, int4: bool, head_dim: int, context: int, window: int | None) -> Tensor:
    queries, batch = _empty(4, _HEADS, head_dim, dtype=dtype), _batch(4, context)
    block = _block(dtype, int4, head_dim)
    return paged_attention_triton(queries, block, batch, head_dim**-0.5, window, rotated=True)


def _pages() -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        for int4 in (True, False):
            label = f"{_SHORT[dtype]}, {'INT4' if int4 else 'full'} pages"
            yield Case(
                f"turn and write, {label}", partial(_turn, dtype, int4, False), label.startswith("bf16, I")
            )
            yield Case(f"write, {label}", partial(_write, dtype, int4), label.startswith("bf16, I"))
        yield Case(f"rotate, {_SHORT[dtype]}", partial(_rotate, dtype), dtype == BF16)
    yield Case("turn and write, bf16, INT4 pages, head norms", partial(_turn, BF16, True, True))
    yield Case("turn and write, bf16, full pages, head norms", partial(_turn, BF16, False, True))


def _turn(dtype: torch.dtype, int4: bool, normed: bool) -> Tensor:
    heads, batch = _HEADS + 2 * _KV_HEADS, _batch(4, 512)
    qkv, table = _empty(4, heads, 128, dtype=dtype), _empty(32768, 2, 128, dtype=dtype)
    norm = _empty(_HEADS + _KV_HEADS, 128, dtype=dtype) if normed else None
    block = _block(dtype, int4, 128)
    return turn_and_write_kv_triton(qkv, table, batch.positions, batch.slots, block, _HEADS, norm, 1e-5)


def _write(dtype: torch.dtype, int4: bool) -> None:
    keys, values = (_empty(4, _KV_HEADS, 128, dtype=dtype) for _ in range(2))
    write_kv_triton(keys, values, _batch(4, 512).slots, _block(dtype, int4, 128))


def _rotate(dtype: torch.dtype) -> Tensor:
    return rotate_heads_triton(_empty(4, _HEADS, 128, dtype=dtype))


def _norms() -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        for size in (_HIDDEN, 768):
            label = f"{_SHORT[dtype]}, {size}"
            yield Case(f"rms norm, {label}", partial(_rms, dtype, size), label == "bf16, 4096")
            yield Case(f"layer norm, {label}", partial(_layer, dtype, size), label == "bf16, 4096")


def _rms(dtype: torch.dtype, size: int) -> Tensor:
    return rms_norm_triton(_empty(4, size, dtype=dtype), _empty(size, dtype=dtype), 1e-5)


def _layer(dtype: torch.dtype, size: int) -> Tensor:
    weight = _empty(size, dtype=dtype)
    return layer_norm_triton(_empty(4, size, dtype=dtype), weight, weight, 1e-5)


def _gates() -> Iterator[Case]:
    yield Case("exit gate, 64 units, 8 of 32000 logits", partial(_gate, _VOCAB, 8), True)
    yield Case("exit gate, 64 units, 8 of 256 listed logits", partial(_gate, 256, 8))
    yield Case("exit gate, no judge", partial(_gate, _VOCAB, 0))
    yield Case(
        "exit gate, 64 units, 8 of 32000 logits that confirm", partial(_gate, _VOCAB, 8, confirms=True)
    )
    yield Case("exit confidence, 64 units, 8 of 32000 logits", _confidence)


def _gate_parts(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Units, logits, what combines a row's features, and a number a row."""
    return (
        _empty(4, 64, dtype=FP32),
        _empty(4, vocab, dtype=FP32),
        _empty(4, dtype=FP32),
        _empty(4, dtype=FP32),
    )


def _judge(tops: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if not tops:
        return None
    row = _empty(64, dtype=FP32)
    return _empty(tops, 64, dtype=FP32), row, row, _empty(dtype=FP32)


def _gate(vocab: int, tops: int, confirms: bool = False) -> object:
    units, logits, combine, row = _gate_parts(vocab)
    probe = probe_logit_triton(units, units[0], _empty(dtype=FP32))
    listed = row if confirms else None
    return decide_triton(probe, logits, row, 0.5, combine, units, _judge(tops), listed, 0.9)


def _confidence() -> Tensor:
    units, logits, combine, row = _gate_parts(_VOCAB)
    return gate_confidence_triton(row, logits, combine, units, _judge(8))


def _draws() -> Iterator[Case]:
    for vocab in (_VOCAB, 128256, 4001):
        yield Case(f"draw of {vocab}", partial(_draw, vocab), vocab == _VOCAB)
        yield Case(f"top-k and top-p of {vocab}", partial(_truncate, vocab), vocab == _VOCAB)
    yield Case("penalties", _penalise, True)


def _draw(vocab: int) -> object:
    logits, keys = _empty(4, vocab, dtype=FP32), _empty(4, 2, dtype=torch.int32)
    return draw_tokens_triton(logits, logits, _empty(4, dtype=FP32), keys, _empty(vocab, dtype=torch.int32))


def _truncate(vocab: int) -> Tensor:
    row, wide = _empty(4, dtype=FP32), _empty(4, dtype=torch.float64)
    return truncate_scores_triton(_empty(4, vocab, dtype=FP32), row, _empty(4, dtype=torch.int32), wide)


def _penalise() -> Tensor:
    ids, starts = _empty(500, dtype=torch.int32), _empty(5, dtype=torch.int32)
    masks, ends = _empty(4, dtype=torch.bool), _empty(2, dtype=torch.int32)
    logits = _empty(4, _VOCAB, dtype=FP32)
    return penalise_scores_triton(logits, ids, starts, _empty(4, dtype=FP32), ends, masks)
