"""Decode steps of whole models with random weights: milliseconds a step, against the bytes that a step must read.

A step is embedding, all blocks, output matrix and argmax, for one token of each sequence; once launched operation by
operation, once as a CUDA graph. The floor is the weights and the keys and values, read at the memory's measured rate.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import KVFormat, WeightFormat
from exeunt.kernels.timing import between_events, timed
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY, Shape, random_decoders
from scripts.gpu_check.paged_rows import PagedRows
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import give_back, has_room, held_formats, within_memory

Step = tuple[WeightFormat, KVFormat, int, int]  # sequences, tokens of each
STEPS: tuple[Step, ...] = (
    ("full", "full", 1, 512),
    ("int4", "int4", 1, 512),
    ("int4", "int4", 16, 4096),
    ("full", "full", 16, 4096),
    ("int4", "full", 16, 4096),
    ("full", "int4", 16, 4096),
    ("full", "full", 64, 4096),
    ("full", "int4", 64, 4096),
    ("int4", "int4", 64, 4096),
    ("int4", "int4", 16, 16384),
    ("full", "full", 16, 16384),
    ("full", "full", 1, 4096),
    ("int4", "int4", 1, 4096),
    ("full", "full", 64, 512),
    ("int4", "int4", 64, 512),
    ("full", "full", 16, 512),
    ("int4", "int4", 16, 512),
    ("int4", "int4", 1, 16384),
    ("full", "full", 1, 16384),
)
_SMALLER_STEPS = 4
"""Of the smaller model so many are timed."""
_TOY_STEPS: tuple[Step, ...] = (("full", "full", 1, 20), ("int4", "int4", 2, 40))
_SECONDS_A_STEP = 2.0
_BESIDE = 1.5e9  # bytes beside keys and values: states, logits, what a graph holds


@torch.inference_mode()
def run(context: Context, found: Found) -> None:
    """Every step that fits in time and memory, the larger model first."""
    found["steps"] = []
    for shape in _shapes(context):
        if context.fits(4, shape.name, found):
            with within_memory(context, shape.name, found):
                _steps_of(context, found, shape)
            give_back(context)


def _steps_of(context: Context, found: Found, shape: Shape) -> None:
    """Every step of a model that fits, in the formats of its weights that fit side by side."""
    steps, spec = _steps(context, shape), shape.spec()
    held = held_formats(context, spec, f"{shape.name} with random weights", found)
    decoders = random_decoders(spec, context.device, torch.bfloat16, formats=held)
    for weights, kv, sequences, tokens in steps:
        name = f"{shape.name} {weights}/{kv} {sequences} x {tokens}"
        if weights not in held or not context.fits(_SECONDS_A_STEP, name, found):
            continue
        decoder = decoders[weights, False]
        if not has_room(context, _step_bytes(decoder, kv, sequences, tokens), name, found):
            continue
        with within_memory(context, name, found):
            row: Found = {
                "model": shape.name,
                "weights": weights,
                "kv": kv,
                "sequences": sequences,
                "context": tokens,
            }
            found["steps"].append(row | _step(context, decoder, kv, sequences, tokens))
            context.report.save()


def warm_jobs(context: Context, weights: WeightFormat) -> Iterator[Callable[[], None]]:
    """Calls that run each step of these weights with one block: then its kernels stand compiled.

    The longest contexts add none.
    """
    return (
        partial(_once, context, shape, step)
        for shape in _shapes(context)
        for step in _steps(context, shape)
        if step[0] == weights and step[3] <= 4096
    )


def _once(context: Context, shape: Shape, step: Step) -> None:
    weights, kv, sequences, tokens = step
    decoders = random_decoders(shape.spec(blocks=1), context.device, torch.bfloat16, formats=(weights,))
    _step_call(PagedRows(decoders[weights, False], kv, sequences, tokens), sequences, tokens)()


def _shapes(context: Context) -> tuple[Shape, ...]:
    return (TOY,) if context.quick else (MISTRAL, LLAMA)


def _steps(context: Context, shape: Shape) -> tuple[Step, ...]:
    if context.quick:
        return _TOY_STEPS
    return STEPS if shape is MISTRAL else STEPS[:_SMALLER_STEPS]


def _step_bytes(decoder: Decoder, kv: KVFormat, sequences: int, tokens: int) -> float:
    """Bytes of the keys and values of a step, and of what it computes between them."""
    spec = decoder.spec
    pages = sequences * (tokens + 64) * spec.blocks * 2 * spec.kv_size * 2
    return (pages if kv == "full" else pages * 0.28) + _BESIDE


def _step(context: Context, decoder: Decoder, kv: KVFormat, sequences: int, tokens: int) -> Found:
    """The figures of one step."""
    rows = PagedRows(decoder, kv, sequences, tokens)
    step = _step_call(rows, sequences, tokens)
    if not bool(step()[1].isfinite().all()):
        context.report.check(f"decode step {kv} {sequences} x {tokens} is finite", good=False)
    took = timed([step], context.device)
    read = _weight_bytes(decoder) + sequences * tokens * rows.layout.bytes_per_token
    found: Found = {
        "ms": took.seconds * 1e3,
        "method": took.method,
        "tokens_per_s": sequences / took.seconds,
        "bytes": read,
        "bytes_per_s": read / took.seconds,
    }
    if context.cuda:
        found["eager_ms"] = _eager(step) * 1e3
    if context.report.memory_rate:
        found["floor_ms"] = read / context.report.memory_rate * 1e3
        found["share_of_floor"] = found["floor_ms"] / found["ms"]
    return found


def _step_call(rows: PagedRows, sequences: int, tokens: int) -> "_Step":
    at = [[tokens - 1]] * sequences
    ids = torch.randint(rows.decoder.spec.vocab_size, (sequences,), device=rows.decoder.device)
    return _Step(rows, ids, at)


class _Step:
    """One decode step, the same at every call."""

    def __init__(self, rows: PagedRows, ids: Tensor, positions: list[list[int]]) -> None:
        self._rows, self._ids = rows, ids
        self._batch = rows.batch(range(len(positions)), positions)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """The next tokens [sequences], and the logits."""
        logits = self._rows.logits(self._ids, self._batch)
        return logits.argmax(-1), logits


def _eager(step: _Step) -> float:
    """Seconds of a step launched operation by operation, the median of three."""
    torch.cuda.synchronize()
    return sorted(between_events(step) for _ in range(3))[1]


def _weight_bytes(decoder: Decoder) -> int:
    """Bytes of weights that a step reads: all but the embedding, of which it reads a row a token."""
    sizes = decoder.resident_bytes()
    return sum(sizes[kind] for kind in ("full", "int4", "norms"))
