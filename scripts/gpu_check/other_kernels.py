"""What stands around products and attention: norms, turning and writing, gates, penalties, truncation, draws."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.kv_format import kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.exit_gate import gate_rows
from exeunt.kernels.rows import rms_norm
from exeunt.kernels.timing import Calls, cache_bytes, copies
from exeunt.kernels.token_draw import draw_tokens
from exeunt.kernels.token_draw.scores import penalise_scores, truncate_scores, truncate_scores_reference
from exeunt.kernels.write_kv import turn_and_write_kv
from scripts.gpu_check.kernel_case import Case, random_bf16
from scripts.gpu_check.models import MISTRAL, TOY
from scripts.gpu_check.paged_steps import paged_steps
from scripts.gpu_check.synthetic_exit import synthetic_exit

_EPS = 1e-5
_SEEN = 256  # tokens of each row that penalties look at


def other_cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """All of them, at the sizes of the Mistral-7B shape."""
    spec = (TOY if quick else MISTRAL).spec()
    for rows in (1, 3) if quick else (1, 64, 512):
        yield _norm(device, rows, spec.hidden_size)
        for kv in ("full", "int4"):
            yield _turn(device, quick, rows, kv)
    for rows in (1, 3) if quick else (1, 16, 64):
        yield _gate(device, quick, rows)
        yield _penalties(device, rows, 100 if quick else spec.vocab_size)
        yield _truncation(device, rows, 100 if quick else spec.vocab_size)


def _norm(device: torch.device, rows: int, size: int) -> Case:
    """An RMS norm of rows in bfloat16, beside PyTorch's."""
    nbytes = 4 * rows * size

    def make(count: int) -> dict[str, Calls]:
        weight = random_bf16(size, device=device)
        states = [random_bf16(rows, size, device=device) for _ in range(count)]
        return {
            "rms_norm": [partial(rms_norm, each, weight, _EPS) for each in states],
            "torch": [partial(F.rms_norm, each, (size,), weight, _EPS) for each in states],
        }

    return Case("rms_norm", {"rows": rows, "size": size}, {"rms_norm": nbytes, "torch": nbytes}, make)


def _turn(device: torch.device, quick: bool, tokens: int, kv: KVFormat) -> Case:
    """What a block does between its QKV product and its attention: RoPE, rotation of INT4 pages, writing."""
    spec = (TOY if quick else MISTRAL).spec(blocks=1)
    layout = kv_layout(spec, kv, torch.bfloat16, page_bytes_for(spec, torch.bfloat16))
    heads, kv_heads, head_dim = spec.heads, spec.kv_heads, spec.head_dim
    read = 2 * tokens * (heads + 2 * kv_heads) * head_dim
    nbytes = read + 2 * tokens * heads * head_dim + tokens * layout.bytes_per_token

    def make(count: int) -> dict[str, Calls]:
        pages, batches = paged_steps(layout, device, tokens, 16, min(count, 8))
        qkv = random_bf16(tokens, heads + 2 * kv_heads, head_dim, device=device)
        table = random_bf16(64, 2, head_dim, device=device)
        return {
            "turn_and_write_kv": [
                partial(turn_and_write_kv, qkv, table, batch.positions, batch.slots, pages.block(0), heads)
                for batch in batches
            ]
        }

    return Case("turn_and_write_kv", {"kv": kv, "tokens": tokens}, {"turn_and_write_kv": nbytes}, make)


def _gate(device: torch.device, quick: bool, rows: int) -> Case:
    """An exit's norm, adapter, probe and decision; the projection onto the vocabulary is a product by itself."""
    spec = (TOY if quick else MISTRAL).spec()
    vocab = 100 if quick else spec.vocab_size
    nbytes = 2 * spec.hidden_size**2 + 4 * rows * vocab

    def make(count: int) -> dict[str, Calls]:
        heads = [
            synthetic_exit(spec, device) for _ in range(min(count, copies(nbytes, cache=cache_bytes(device))))
        ]
        hidden = random_bf16(rows, spec.hidden_size, device=device)
        logits, thresholds = torch.randn(rows, vocab, device=device), torch.full((rows,), 0.5, device=device)
        return {
            "exit_gate": [
                partial(gate_rows, hidden, thresholds, head.weights, head.rule, lambda state: logits)
                for head in heads
            ]
        }

    return Case("exit_gate", {"rows": rows, "vocab": vocab}, {"exit_gate": nbytes}, make)


def _penalties(device: torch.device, rows: int, vocab: int) -> Case:
    """Repeated tokens penalised in a copy of the logits."""
    nbytes = 8 * rows * vocab

    def make(count: int) -> dict[str, Calls]:
        whole = partial(torch.randint, vocab, dtype=torch.int32, device=device)
        history, ends = whole((rows * _SEEN,)), whole((1,))
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * _SEEN
        strengths = torch.full((rows,), 1.2, device=device)
        masks = torch.ones(rows, dtype=torch.bool, device=device)
        logits = [torch.randn(rows, vocab, device=device) for _ in range(count)]
        return {
            "penalise_scores": [
                partial(penalise_scores, each, history, starts, strengths, ends, masks) for each in logits
            ]
        }

    return Case("penalise_scores", {"rows": rows, "vocab": vocab}, {"penalise_scores": nbytes}, make)


def _truncation(device: torch.device, rows: int, vocab: int) -> Case:
    """Top-k of 50 and top-p of 0.9, beside what PyTorch does by sorting."""
    nbytes = 8 * rows * vocab

    def make(count: int) -> dict[str, Calls]:
        temperatures = torch.full((rows,), 0.8, device=device)
        top_k = torch.full((rows,), 50, dtype=torch.int32, device=device)
        top_p = torch.full((rows,), 0.9, device=device)
        scores = [3 * torch.randn(rows, vocab, device=device) for _ in range(count)]
        by = {"truncate_scores": truncate_scores, "torch": truncate_scores_reference}
        return {
            name: [partial(function, each, temperatures, top_k, top_p) for each in scores]
            for name, function in by.items()
        }

    both = {"truncate_scores": nbytes, "torch": nbytes}
    return Case("truncate_scores", {"rows": rows, "vocab": vocab}, both, make)


def draw_case(device: torch.device, rows: int, vocab: int) -> Case:
    """A draw at temperature 0.8 of random logits, all of a vocabulary left to choose from."""
    nbytes = 4 * rows * vocab

    def make(count: int) -> dict[str, Calls]:
        temperatures = torch.full((rows,), 0.8, device=device)
        keys = torch.randint(2**31 - 1, (rows, 2), dtype=torch.int32, device=device)
        token_keys = torch.randint(2**31 - 1, (vocab,), dtype=torch.int32, device=device)
        logits = [3 * torch.randn(rows, vocab, device=device) for _ in range(count)]
        return {
            "draw_tokens": [
                partial(draw_tokens, each, each, temperatures, keys, token_keys) for each in logits
            ],
            "softmax and multinomial": [partial(_multinomial, each) for each in logits],
        }

    both = {"draw_tokens": nbytes, "softmax and multinomial": nbytes}
    return Case("draw_tokens", {"rows": rows, "vocab": vocab}, both, make)


def _multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial((logits / 0.8).softmax(-1), 1)
