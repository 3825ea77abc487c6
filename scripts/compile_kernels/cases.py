"""What is compiled: calls of the kernels' wrappers at the shapes of a 7B model, over tensors without data.

Tiles and the like are the wrappers' own. A kernel's machine code depends on a call's dtypes, on which parts it has and
on what its sizes are divisible by; each case says one such choice.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from exeunt.kernels.exit_gate.triton import decide_triton, gate_confidence_triton, probe_logit_triton
from exeunt.kernels.paged_attention.triton import paged_attention_triton
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.rows.triton import layer_norm_triton, rms_norm_triton
from exeunt.kernels.token_draw.scores_triton import penalise_scores_triton, truncate_scores_triton
from exeunt.kernels.token_draw.triton import draw_tokens_triton
from exeunt.kernels.write_kv.triton import rotate_heads_triton, turn_and_write_kv_triton, write_kv_triton
from scripts.compile_kernels.case import BF16, FP16, FP32, HIDDEN, SHORT, Case, empty
from scripts.compile_kernels.linear_cases import linear_cases

_VOCAB = 32000
_HEADS, _KV_HEADS = 32, 8
_PAGE_TOKENS = {False: 16, True: 60}  # by whether pages are INT4


def all_cases() -> list[Case]:
    """Every case, those that the test suite compiles first. Raises KeyError for measured launches of an unknown GPU."""
    cases = [*linear_cases(), *_attention(), *_pages(), *_norms(), *_gates(), *_draws()]
    return sorted(cases, key=lambda case: not case.tested)


def _block(dtype: torch.dtype, int4: bool, head_dim: int) -> KVBlock:
    """A block's pages within larger ones that 31 other blocks share."""
    tokens = _PAGE_TOKENS[int4]

    def pages(width: int, kind: torch.dtype) -> Tensor:
        return empty(64, 32, _KV_HEADS, tokens, width, dtype=kind)[:, 1]

    if not int4:
        return KVBlock(pages(head_dim, dtype), pages(head_dim, dtype))
    keys, values = (pages(head_dim // 2, torch.uint8) for _ in range(2))
    return KVBlock(keys, values, pages(2, FP16), pages(2, FP16))


def _batch(tokens: int, context: int) -> PagedBatch:
    numbers = empty(tokens, dtype=torch.int64)
    starts = empty(tokens + 1, dtype=torch.int32)
    return PagedBatch(numbers, numbers, starts, empty(tokens, context // 16, dtype=torch.int32), context)


def _attention() -> Iterator[Case]:
    for dtype, head_dim, int4, context, window, group in (
        (BF16, 128, True, 4096, None, 4),
        (BF16, 128, False, 4096, None, 4),
        (BF16, 128, True, 512, None, 4),
        (BF16, 128, False, 512, None, 4),
        (BF16, 128, True, 4096, 4096, 4),
        (BF16, 128, False, 4096, 4096, 4),
        *((BF16, size, int4, 4096, None, 4) for size in (64, 80, 96) for int4 in (False, True)),
        *((dtype, 128, int4, 4096, None, 4) for dtype in (FP16, FP32) for int4 in (False, True)),
        # one query head to a KV head, seven and twenty; windows of other dtypes and head sizes
        *((BF16, 128, int4, 4096, None, group) for group in (1, 7) for int4 in (False, True)),
        (BF16, 64, False, 4096, None, 1),
        (FP16, 64, True, 512, None, 7),
        (BF16, 64, True, 512, 256, 20),
        (FP16, 128, True, 4096, 4096, 4),
        (FP16, 96, False, 512, 256, 4),
        (BF16, 80, True, 4096, 4096, 1),
        (FP32, 64, False, 512, 256, 7),
    ):
        kind = "INT4" if int4 else "full"
        how = "shared" if context > 512 else "folded"
        name = f"attention, {SHORT[dtype]}, {kind} pages, heads of {head_dim}, splits {how}"
        name += ", window" if window else ""
        name += f", {group} query head{'s' if group > 1 else ''} to a KV head" if group != 4 else ""
        tested = (dtype, head_dim, context, window, group) == (BF16, 128, 4096, None, 4)
        yield Case(name, partial(_attend, dtype, int4, head_dim, context, window, group), tested)


def _attend(
    dtype: torch.dtype, int4: bool, head_dim: int, context: int, window: int | None, group: int
) -> Tensor:
    queries, batch = empty(4, group * _KV_HEADS, head_dim, dtype=dtype), _batch(4, context)
    block = _block(dtype, int4, head_dim)
    return paged_attention_triton(queries, block, batch, head_dim**-0.5, window, rotated=True)


def _pages() -> Iterator[Case]:
    for dtype, size in (*((dtype, 128) for dtype in SHORT), (BF16, 64), (FP16, 80), (BF16, 96), (FP32, 64)):
        heads = "" if size == 128 else f", heads of {size}"
        for int4 in (True, False):
            tested = (dtype, size, int4) == (BF16, 128, True)
            label = f"{SHORT[dtype]}, {'INT4' if int4 else 'full'} pages"
            yield Case(f"turn and write, {label}{heads}", partial(_turn, dtype, int4, size), tested)
            yield Case(f"write, {label}{heads}", partial(_write, dtype, int4, size), tested)
        label = f"rotate, {SHORT[dtype]}{heads}"
        yield Case(label, partial(_rotate, dtype, size), (dtype, size) == (BF16, 128))
    for dtype, size, int4 in ((BF16, 128, True), (BF16, 128, False), (FP16, 64, True), (BF16, 80, False)):
        heads = "" if size == 128 else f", heads of {size}"
        label = f"turn and write, {SHORT[dtype]}, {'INT4' if int4 else 'full'} pages{heads}, head norms"
        yield Case(label, partial(_turn, dtype, int4, size, normed=True))


def _turn(dtype: torch.dtype, int4: bool, size: int, normed: bool = False) -> Tensor:
    heads, batch = _HEADS + 2 * _KV_HEADS, _batch(4, 512)
    qkv, table = empty(4, heads, size, dtype=dtype), empty(32768, 2, size, dtype=dtype)
    norm = empty(_HEADS + _KV_HEADS, size, dtype=dtype) if normed else None
    block = _block(dtype, int4, size)
    return turn_and_write_kv_triton(qkv, table, batch.positions, batch.slots, block, _HEADS, norm, 1e-5)


def _write(dtype: torch.dtype, int4: bool, size: int) -> None:
    keys, values = (empty(4, _KV_HEADS, size, dtype=dtype) for _ in range(2))
    write_kv_triton(keys, values, _batch(4, 512).slots, _block(dtype, int4, size))


def _rotate(dtype: torch.dtype, size: int) -> Tensor:
    return rotate_heads_triton(empty(4, _HEADS, size, dtype=dtype))


def _norms() -> Iterator[Case]:
    for dtype in (BF16, FP16, FP32):
        for size in (HIDDEN, 768):
            label = f"{SHORT[dtype]}, {size}"
            yield Case(f"rms norm, {label}", partial(_rms, dtype, size), label == "bf16, 4096")
            yield Case(f"layer norm, {label}", partial(_layer, dtype, size), label == "bf16, 4096")


def _rms(dtype: torch.dtype, size: int) -> Tensor:
    return rms_norm_triton(empty(4, size, dtype=dtype), empty(size, dtype=dtype), 1e-5)


def _layer(dtype: torch.dtype, size: int) -> Tensor:
    weight = empty(size, dtype=dtype)
    return layer_norm_triton(empty(4, size, dtype=dtype), weight, weight, 1e-5)


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
        empty(4, 64, dtype=FP32),
        empty(4, vocab, dtype=FP32),
        empty(4, dtype=FP32),
        empty(4, dtype=FP32),
    )


def _judge(tops: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    if not tops:
        return None
    row = empty(64, dtype=FP32)
    return empty(tops, 64, dtype=FP32), row, row, empty(dtype=FP32)


def _gate(vocab: int, tops: int, confirms: bool = False) -> object:
    units, logits, combine, row = _gate_parts(vocab)
    probe = probe_logit_triton(units, units[0], empty(dtype=FP32))
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
    logits, keys = empty(4, vocab, dtype=FP32), empty(4, 2, dtype=torch.int32)
    return draw_tokens_triton(logits, logits, empty(4, dtype=FP32), keys, empty(vocab, dtype=torch.int32))


def _truncate(vocab: int) -> Tensor:
    row, wide = empty(4, dtype=FP32), empty(4, dtype=torch.float64)
    return truncate_scores_triton(empty(4, vocab, dtype=FP32), row, empty(4, dtype=torch.int32), wide)


def _penalise() -> Tensor:
    ids, starts = empty(500, dtype=torch.int32), empty(5, dtype=torch.int32)
    masks, ends = empty(4, dtype=torch.bool), empty(2, dtype=torch.int32)
    logits = empty(4, _VOCAB, dtype=FP32)
    return penalise_scores_triton(logits, ids, starts, empty(4, dtype=FP32), ends, masks)
