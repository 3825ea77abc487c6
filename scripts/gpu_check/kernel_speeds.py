"""Each kernel by itself at the shapes of known models: time, bytes per second, and what PyTorch takes for the same.

Buffers take turns so that a last-level cache does not hold them. "share_of_memory" is the bytes that must be moved over
the time taken, as a share of the memory's rate measured in the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.kv_format import KVPages, kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.full_linear import full_linear
from exeunt.kernels.int4_linear import Int4Weight, int4_linear, pack
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.kernels.timing import Calls, copies, timed
from exeunt.kernels.token_draw import draw_tokens
from exeunt.kernels.write_kv import write_kv
from scripts.gpu_check.models import GROUP_SIZE, MISTRAL
from scripts.gpu_check.report import Context, Found

ROWS = (1, 16, 64, 4, 512)
LAYERS = {
    "mistral-7b gate_up": (28672, 4096),
    "mistral-7b out": (4096, 4096),
    "mistral-7b down": (4096, 14336),
    "mistral-7b qkv": (6144, 4096),
    "mistral-7b head": (32000, 4096),
    "llama-1.1b gate_up": (11264, 2048),
    "llama-1.1b down": (2048, 5632),
    "llama-1.1b qkv": (2560, 2048),
}
CONTEXTS = (
    (16, 16384),
    (64, 4096),
    (1, 16384),
    (16, 4096),
    (1, 4096),
    (1, 512),
    (64, 512),
    (16, 512),
    (64, 16384),
)
"""Sequences and tokens of each."""
DRAWS = ((1, 32000), (64, 32000), (16, 32000), (64, 128256), (1, 128256))
_SECONDS_A_CASE = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time. `make` gives, by implementation, calls on buffers that take turns, given how many of these.

    `nbytes` are what each implementation must move; the first is ours.
    """

    op: str
    sizes: dict[str, Any]
    nbytes: dict[str, int]
    make: Callable[[int], dict[str, Calls]]

    @property
    def name(self) -> str:
        """The operation and its sizes."""
        return f"{self.op} {' '.join(f'{key}={value}' for key, value in self.sizes.items())}"


@torch.inference_mode()
def run(context: Context, found: Found) -> None:
    """Time every case that fits; one that breaks does not end the others."""
    found["cases"] = []
    for case in cases(context):
        if not context.fits(_SECONDS_A_CASE, case.name, found):
            continue
        try:
            found["cases"].append(_timed(context, case))
        except Exception as error:  # noqa: BLE001 - one kernel that breaks leaves the others worth timing
            found["cases"].append(
                {"op": case.op, **case.sizes, "error": f"{type(error).__name__}: {error}"[:300]}
            )
            context.report.check(
                f"kernel {case.name} runs", good=False, error=f"{type(error).__name__}: {error}"[:300]
            )
            if context.cuda:
                torch.cuda.synchronize()  # an error that no later call survives ends the section here
        context.report.save()


def warm_jobs(context: Context, *, linears: bool) -> Iterator[Callable[[], None]]:
    """Calls that run each linear, or each other kernel, once: then it stands compiled. The largest cases add none."""
    some = (case for case in cases(context) if (case.op == "int4_linear") == linears)
    return (partial(_once, case) for case in some if min(case.nbytes.values()) < 1e9)


def _once(case: Case) -> None:
    for calls in case.make(1).values():
        calls[0]()


def cases(context: Context) -> Iterator[Case]:
    """All cases, by how much their answers are wanted."""
    device, quick = context.device, context.quick
    layers = {"toy up": (128, 64), "toy down": (64, 128)} if quick else LAYERS
    contexts = ((2, 40), (1, 70)) if quick else CONTEXTS
    rows = (1, 4) if quick else ROWS
    attention = [_attention(device, quick, *sizes, kv) for sizes in contexts for kv in ("full", "int4")]
    linears = [_linear(device, layer, *shape, count) for count in rows for layer, shape in layers.items()]
    yield from attention[:6]
    yield from linears[: len(layers) * 2]
    yield from attention[6:8]
    for count, vocab in ((2, 100),) if quick else DRAWS:
        yield _draw(device, count, vocab)
    for count in (1, 3) if quick else (1, 64, 512):
        for kv in ("full", "int4"):
            yield _write(device, quick, count, kv)
    yield from linears[len(layers) * 2 :]
    yield from attention[8:]


def _timed(context: Context, case: Case) -> Found:
    """The times of a case, our own as "us"."""
    smallest = min(case.nbytes.values())
    row: Found = {"op": case.op, **case.sizes}
    ours: float | None = None
    for name, calls in case.make(copies(smallest) if context.cuda else 2).items():
        took = timed(calls, context.device)
        rate = case.nbytes[name] / took.seconds
        figures: Found = {"us": took.seconds * 1e6, "bytes_per_s": rate, "method": took.method}
        if context.report.memory_rate:
            figures["share_of_memory"] = rate / context.report.memory_rate
        if ours is None:
            ours = took.seconds
            row |= figures
        else:
            row[name] = {**figures, "ratio": took.seconds / ours}
    return row


def _linear(device: torch.device, layer: str, outputs: int, inputs: int, rows: int) -> Case:
    """INT4, then full, then PyTorch's own product in bfloat16; the INT4 line is ours, full is beside it."""
    groups = -(-inputs // GROUP_SIZE)
    rest = 2 * rows * (inputs + outputs)
    full = 2 * inputs * outputs + rest

    def make(count: int) -> dict[str, Calls]:
        x = torch.randn(rows, inputs, device=device).to(torch.bfloat16)
        fulls = max(1, min(count, copies(full)))
        weights = [_random(outputs, inputs, device=device) for _ in range(fulls)]
        packed = [pack(_int4(outputs, inputs, groups, device)) for _ in range(count)]
        return {
            "int4_linear": [partial(int4_linear, x, weight) for weight in packed],
            "full_linear": [partial(full_linear, x, weight) for weight in weights],
            "torch": [partial(F.linear, x, weight) for weight in weights],
        }

    nbytes = {
        "int4_linear": inputs * outputs // 2 + 4 * outputs * groups + rest,
        "full_linear": full,
        "torch": full,
    }
    return Case("int4_linear", {"layer": layer, "rows": rows}, nbytes, make)


def _int4(outputs: int, inputs: int, groups: int, device: torch.device) -> Int4Weight:
    codes = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(outputs, groups, device=device).half() / 100
    return Int4Weight(codes, scales, -7.5 * scales, GROUP_SIZE, inputs, outputs)


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)


def _attention(device: torch.device, quick: bool, sequences: int, tokens: int, kv: KVFormat) -> Case:
    """A decode step of one block: every sequence asks with one token. SDPA reads keys and values that lie together."""
    heads, kv_heads, head_dim = (4, 2, 16) if quick else (32, 8, 128)
    full = 2 * sequences * tokens * kv_heads * head_dim * 2
    ours = full if kv == "full" else 2 * sequences * tokens * kv_heads * (head_dim // 2 + 4)

    def make(count: int) -> dict[str, Calls]:
        queries = torch.randn(sequences, heads, head_dim, device=device).to(torch.bfloat16)
        pages, batches = _paged(device, quick, sequences, tokens, kv, count)
        block, scale = pages.block(0), head_dim**-0.5
        found: dict[str, Calls] = {
            "paged_attention": [partial(paged_attention, queries, block, batch, scale) for batch in batches]
        }
        if kv == "full":
            shape = (sequences, kv_heads, tokens, head_dim)
            some = max(1, min(count, copies(full)))
            pairs = [[_random(*shape, device=device) for _ in range(2)] for _ in range(some)]
            q = queries[:, :, None]
            found["sdpa"] = [
                partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
                for keys, values in pairs
            ]
        return found

    sizes = {"kv": kv, "sequences": sequences, "context": tokens}
    return Case("paged_attention", sizes, {"paged_attention": ours, "sdpa": full}, make)


def _paged(
    device: torch.device, quick: bool, sequences: int, tokens: int, kv: KVFormat, count: int
) -> tuple[KVPages, list[PagedBatch]]:
    """Pages of one block, and `count` decode steps over different ones of them."""
    spec = MISTRAL.spec(blocks=1)
    layout = kv_layout(spec, kv, torch.bfloat16, page_bytes_for(spec, torch.bfloat16))
    if quick:
        layout = type(layout)(kv, (0,), 2, 16, torch.bfloat16, 2048)
    each = -(-tokens // layout.page_tokens)
    arena = torch.empty(
        count * sequences * each * layout.page_bytes // 2, dtype=torch.bfloat16, device=device
    )
    pages = KVPages(layout, arena.normal_().view(torch.uint8))
    tables = torch.randperm(pages.num_pages, device=device).view(count, sequences, each).to(torch.int32)
    at = torch.full((sequences,), tokens - 1, dtype=torch.int64, device=device)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    size = layout.page_tokens
    batches = [
        PagedBatch(at, table[:, -1].long() * size + (tokens - 1) % size, starts, table.contiguous(), tokens)
        for table in tables
    ]
    return pages, batches


def _write(device: torch.device, quick: bool, tokens: int, kv: KVFormat) -> Case:
    """The keys and values of so many tokens of one block, each to a page of its own sequence."""
    kv_heads, head_dim = (2, 16) if quick else (8, 128)
    read = 2 * tokens * kv_heads * head_dim * 2
    written = read if kv == "full" else 2 * tokens * kv_heads * (head_dim // 2 + 4)

    def make(count: int) -> dict[str, Calls]:
        pages, batches = _paged(device, quick, tokens, 16, kv, min(count, 8))
        keys, values = (
            torch.randn(tokens, kv_heads, head_dim, device=device).to(torch.bfloat16) for _ in range(2)
        )
        return {
            "write_kv": [partial(write_kv, keys, values, batch.slots, pages.block(0)) for batch in batches]
        }

    return Case("write_kv", {"kv": kv, "tokens": tokens}, {"write_kv": read + written}, make)


def _draw(device: torch.device, rows: int, vocab: int) -> Case:
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
