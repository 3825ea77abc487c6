"""Each kernel by itself at the shapes of known models: time, bytes per second, and what PyTorch takes for the same.

Beside some linears stands what the same kernel takes with tile and parts chosen freely for that number of rows.

Buffers take turns so that a last-level cache does not hold them. "share_of_memory" is the bytes that must be moved over
the time taken, as a share of the memory's rate measured in the same run. Cases so small that all of their buffers lie
in the cache say "cached", and no share: their rate is not the memory's.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.variant import WeightFormat
from exeunt.kernels.full_linear import full_linear
from exeunt.kernels.gpu import triton_runs
from exeunt.kernels.int4_linear import Int4Weight, int4_linear, pack
from exeunt.kernels.timing import Calls, cache_bytes, cached, copies, timed
from exeunt.kernels.tuned.shape import LinearShape
from scripts.gpu_check.kernel_case import Case, random_bf16
from scripts.gpu_check.models import GROUP_SIZE
from scripts.gpu_check.other_kernels import draw_case, other_cases
from scripts.gpu_check.paged_cases import attention_case, write_case
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import LACKING, has_room

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
LAYERS_TOY = {"toy up": (128, 64), "toy down": (64, 128)}
FREE_LAYERS = ("mistral-7b gate_up", "mistral-7b out")
"""Layers whose launches are chosen freely too: with many tiles, and with few."""
_FORMATS: tuple[WeightFormat, ...] = ("full", "int4")
_SECONDS_A_CASE = 1.0
_SECONDS_A_CHOICE = 1.5  # of a layer's weights in one format with one number of rows


@torch.inference_mode()
def run(context: Context, found: Found) -> None:
    """Time every case that fits; one that breaks does not end the others."""
    found["cases"] = []
    for case in cases(context):
        if not context.fits(_SECONDS_A_CASE, case.name, found):
            continue
        count = _buffers(context, min(case.nbytes.values()))
        if not has_room(context, case.buffer_bytes(count), case.name, found):
            continue
        try:
            found["cases"].append(_timed(context, case, count))
        except LACKING as error:
            found.setdefault("skipped", []).append(f"{case.name}: {error}".partition("\n")[0][:300])
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
    _choose_freely(context, found)


def _choose_freely(context: Context, found: Found) -> None:
    """Beside the times of some linears, those of the fastest way that their number of rows leaves open."""
    if not triton_runs(context.device):
        return
    cases = [each for each in found["cases"] if each["op"] == "int4_linear"]
    linears = {(each["layer"], each["rows"]): each for each in cases}
    for layer, rows, weights in _free_choices(context):
        name = f"{layer} {weights}, {rows} rows, chosen freely"
        row = linears.get((layer, rows), {})
        if "us" not in row or not context.fits(_SECONDS_A_CHOICE, name, found):
            continue
        try:
            row[f"{weights}_free"] = _free(context, layer, rows, weights)
        except Exception as error:  # noqa: BLE001 - it is no kernel that anybody runs
            found.setdefault("skipped", []).append(f"{name}: {type(error).__name__}: {error}"[:300])
        context.report.save()


def _free_choices(context: Context) -> Iterator[tuple[str, int, WeightFormat]]:
    layers = tuple(LAYERS_TOY)[:1] if context.quick else FREE_LAYERS
    for rows in (1, 4) if context.quick else ROWS:
        for layer in layers:
            for weights in _FORMATS:
                yield layer, rows, weights


def _free(context: Context, layer: str, rows: int, weights: WeightFormat) -> Found:
    from scripts.gpu_check.free_launches import fastest_free  # Triton is there only where a GPU is

    outputs, inputs = (LAYERS_TOY if context.quick else LAYERS)[layer]
    shape = LinearShape(inputs, outputs, weights == "int4", group_size=GROUP_SIZE)
    calls = _linear(context.device, layer, outputs, inputs, rows).make(_buffers(context, shape.weight_bytes))
    left = context.within(_SECONDS_A_CHOICE).clock.left
    return fastest_free(calls[f"{weights}_linear"], shape, rows, context.device, left)


def free_warm_jobs(context: Context, weights: WeightFormat) -> Iterator[Callable[[], None]]:
    """Calls that run a layer once in every way that is tried for each number of rows: then all stand compiled."""
    if triton_runs(context.device):
        layer = tuple(LAYERS_TOY if context.quick else LAYERS)[1]
        for rows in (1, 4) if context.quick else ROWS:
            yield partial(_run_all_ways, context, layer, rows, weights)


def _run_all_ways(context: Context, layer: str, rows: int, weights: WeightFormat) -> None:
    from scripts.gpu_check.free_launches import chosen, free_launches

    outputs, inputs = (LAYERS_TOY if context.quick else LAYERS)[layer]
    shape = LinearShape(inputs, outputs, weights == "int4", group_size=GROUP_SIZE)
    (call,) = _linear(context.device, layer, outputs, inputs, rows).make(1)[f"{weights}_linear"]
    for way in free_launches(shape, rows):
        if context.clock.left() > 0:
            with suppress(Exception), chosen(way):  # the choice meets it again
                call()


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
    layers = LAYERS_TOY if quick else LAYERS
    contexts = ((2, 40), (1, 70)) if quick else CONTEXTS
    rows = (1, 4) if quick else ROWS
    attention = [attention_case(device, quick, *sizes, kv) for sizes in contexts for kv in ("full", "int4")]
    linears = [_linear(device, layer, *shape, count) for count in rows for layer, shape in layers.items()]
    yield from attention[:6]
    yield from linears[: len(layers) * 2]
    yield from attention[6:8]
    for count, vocab in ((2, 100),) if quick else DRAWS:
        yield draw_case(device, count, vocab)
    for count in (1, 3) if quick else (1, 64, 512):
        for kv in ("full", "int4"):
            yield write_case(device, quick, count, kv)
    yield from linears[len(layers) * 2 :]
    yield from other_cases(device, quick)
    if triton_runs(device):  # elsewhere no kernel does it in one
        name, (outputs, inputs) = next(iter(layers.items()))
        for count in rows:
            yield _gated(device, name, outputs, inputs, count)
    yield from attention[8:]


def _timed(context: Context, case: Case, count: int) -> Found:
    """The times of a case over at most so many buffers, our own as "us"."""
    row: Found = {"op": case.op, **case.sizes}
    ours: float | None = None
    for name, calls in case.make(count).items():
        took = timed(calls, context.device)
        rate = case.nbytes[name] / took.seconds
        figures: Found = {"us": took.seconds * 1e6, "bytes_per_s": rate, "method": took.method}
        if context.cuda and cached(case.nbytes[name], len(calls), cache=cache_bytes(context.device)):
            figures["cached"] = True
        elif context.report.memory_rate:
            figures["share_of_memory"] = rate / context.report.memory_rate
        if ours is None:
            ours = took.seconds
            row |= figures
        else:
            row[name] = {**figures, "ratio": took.seconds / ours}
    return row


def _buffers(context: Context, nbytes: int) -> int:
    """How many buffers of `nbytes` take turns."""
    return copies(nbytes, cache=cache_bytes(context.device)) if context.cuda else 2


def _linear(device: torch.device, layer: str, outputs: int, inputs: int, rows: int) -> Case:
    """INT4, then full, then PyTorch's own product in bfloat16; the INT4 line is ours, full is beside it."""
    groups = -(-inputs // GROUP_SIZE)
    rest = 2 * rows * (inputs + outputs)
    full = 2 * inputs * outputs + rest

    def make(count: int) -> dict[str, Calls]:
        x = torch.randn(rows, inputs, device=device).to(torch.bfloat16)
        fulls = max(1, min(count, copies(full, cache=cache_bytes(device))))
        weights = [random_bf16(outputs, inputs, device=device) for _ in range(fulls)]
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


def _gated(device: torch.device, layer: str, outputs: int, inputs: int, rows: int) -> Case:
    """Gate and up products with their activation, as a block runs them: INT4, full, and PyTorch one by one."""
    from exeunt.kernels.full_linear.triton import full_linear_triton
    from exeunt.kernels.int4_linear.triton import int4_linear_triton

    plain = _linear(device, layer, outputs, inputs, rows)
    x = random_bf16(rows, inputs, device=device)

    def weights(calls: Calls) -> list[Any]:
        return [call.args[1] for call in calls if isinstance(call, partial)]

    def make(count: int) -> dict[str, Calls]:
        made = plain.make(count)
        int4 = partial(int4_linear_triton, activation="silu", gated=True)
        full = partial(full_linear_triton, activation="silu", gated=True)
        return {
            "int4": [partial(int4, x, each) for each in weights(made["int4_linear"])],
            "full": [partial(full, x, each) for each in weights(made["full_linear"])],
            "torch": [partial(_gated_by_torch, x, each) for each in weights(made["torch"])],
        }

    names = {"int4": "int4_linear", "full": "full_linear", "torch": "torch"}
    nbytes = {name: plain.nbytes[other] - rows * outputs for name, other in names.items()}
    return Case("gated_linear", {"layer": layer, "rows": rows}, nbytes, make)


def _gated_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def _int4(outputs: int, inputs: int, groups: int, device: torch.device) -> Int4Weight:
    codes = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.rand(outputs, groups, device=device).half() / 100
    return Int4Weight(codes, scales, -7.5 * scales, GROUP_SIZE, inputs, outputs)
