"""Batches of 1 to 64 in contexts of 512 to 16,384 tokens: the engine in its modes, and transformers' static cache.

The Mistral-7B and the Llama-1.1B shape with random weights: speeds only; exits and the linear block are synthetic. Each
number of streams in each context is a cell. The most telling cells come first, and may take more than an even share of
their shape's time. Memory is asked for first: where full keys and values have no room, INT4 ones alone are timed. A
mode is begun where three of its runs fit: by what they are expected to take at a share of the product's rate, and by
how much longer the cell before took than that. What is left out says why.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from exeunt.compression.architecture import Architecture
from exeunt.compression.kv_format import page_bytes_for
from exeunt.compression.model import LoadedModel
from scripts.gpu_check.compiled import LEAST as LEAST_COMPILED
from scripts.gpu_check.compiled import compiled_apart
from scripts.gpu_check.end_to_end import SYNTHETIC, random_model
from scripts.gpu_check.engine_speeds import FULL, HALF, INT4, LEAST, LINEAR, OFF, Modes
from scripts.gpu_check.long_contexts import cell, engine_in_context
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY, Shape
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.prompts import shifted_prompts
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import LACKING, give_back, has_room, weight_bytes, within_memory
from scripts.gpu_check.sizes import Sizes
from scripts.gpu_check.synthetic_block import with_linear_block
from scripts.gpu_check.transformers_speeds import generate_speed, transformers_model, tried

STREAMS: Final = (1, 4, 16, 64)
CONTEXTS: Final = (512, 2048, 4096, 16384)
ANSWER: Final = 32  # tokens
Cells = tuple[tuple[int, int], ...]
CELLS: Final[Cells] = (
    *((1, 512), (64, 512), (16, 4096), (1, 16384), (64, 4096), (16, 16384)),
    *((1, 4096), (16, 512), (4, 4096), (16, 2048), (64, 2048), (1, 2048)),
    *((4, 512), (4, 2048), (4, 16384), (64, 16384)),
)
"""Streams and tokens of each prompt: first the corners that have room, then what lies between."""
TOY_CELLS: Final[Cells] = ((2, 24), (1, 40))
MODES: Final[Modes] = {
    "int4/int4": (INT4, OFF),
    "full/full": (FULL, OFF),
    f"int4/int4 exits at 0.5 {SYNTHETIC}": (INT4, HALF),
    f"full/full exits at 0.5 {SYNTHETIC}": (FULL, HALF),
    f"int4/int4 linear block exits at 0.5 {SYNTHETIC}": (LINEAR, HALF),
}
COMPILED: Final = (
    (MISTRAL, 1, 512),
    (LLAMA, 1, 512),
    (MISTRAL, 16, 512),
    (LLAMA, 16, 512),
    (MISTRAL, 1, 4096),
)
SHARES: Final = {"engine": (0.38, 0.15), "transformers": (0.16, 0.07), "compiled": (0.24,)}
"""Of the time: of the larger shape and the smaller one."""
_EVEN: Final = 3.0  # times its even share of the time left a cell may take
_LEAST_CELL: Final = 10.0  # seconds that it may take at any rate
_RUNS: Final = 3.0  # of a load that must fit: a warm one, perhaps another, and the one that is timed
_RATE: Final = 0.3  # of the product's rate, at which prompts are expected to be read
_LEAST_OFF: Final = 0.8  # short loads that go faster say little of long ones
_UNMEASURED: Final = 4e14  # operations per second of the product, where it was not measured
_TOKEN: Final = {"engine": 0.02, "transformers": 0.05}  # seconds of a step, expected
_BESIDE: Final = 4e9  # bytes beside weights, keys and values
_STATES: Final = 6  # of a prompt's inner states that transformers holds at once


def run(context: Context, found: Found) -> None:
    """The larger shape in the engine and in transformers, the smaller one, then what is compiled."""
    shapes = (TOY,) if context.quick else (MISTRAL, LLAMA)
    left, least = context.clock.left(), 0.0 if context.quick else 10.0
    parts = [
        Part(f"{who} {shape.name}", f"{who} {shape.name}", share * left, least, partial(timed, found, shape))
        for number, shape in enumerate(shapes)
        for who, timed in (("engine", _engine), ("transformers", _transformers))
        for share in SHARES[who][number : number + 1]
    ]
    compiled = Part("compiled", "compiled", SHARES["compiled"][0] * left, least, partial(_compiled, found))
    run_parts(context, found, [*parts, compiled])


@dataclass(slots=True)
class Pace:
    """What runs are expected to take, and how much longer or shorter they took so far."""

    spec: Architecture
    rate: float  # operations per second
    token: float  # seconds
    off: float = 1.0

    def expected(self, sizes: Sizes) -> float:
        """Seconds of one run of a load: its prompts' products and attention, and a step a token."""
        tokens, spec = sizes.most * sizes.prompt, self.spec
        products = 2 * spec.blocks * spec.block_parameters * tokens
        attention = 2 * sizes.prompt * spec.hidden_size * spec.blocks * tokens
        return (products + attention) / self.rate + sizes.answer * self.token

    def needed(self, sizes: Sizes) -> float:
        """Seconds that all runs of a load are expected to take."""
        return _RUNS * self.off * self.expected(sizes)

    def note(self, sizes: Sizes, own: Found, who: str) -> None:
        """Learn from what a load has taken at most in a cell: of the `who` that is paced."""
        ends = f", {sizes.most} streams"
        rows = [row for name, row in own.items() if name.startswith(who) and name.endswith(ends)]
        if took := [row["seconds"] for row in rows if "seconds" in row]:
            self.off = max(_LEAST_OFF, max(took) / self.expected(sizes))


def _pace(context: Context, spec: Architecture, who: str) -> Pace:
    if not context.cuda:
        return Pace(spec, 1e12, 1e-4)  # of a toy
    rate = context.report.section("machine").get("matmul_bf16_flop_per_s", _UNMEASURED)
    return Pace(spec, _RATE * rate, _TOKEN[who])


def _cells(context: Context) -> tuple[Sizes, ...]:
    cells, answer = (TOY_CELLS, 3) if context.quick else (CELLS, ANSWER)
    return tuple(Sizes((streams,), tokens, answer) for streams, tokens in cells)


def share_of(context: Context, cells_left: int) -> Context:
    """What a cell may take: the first ones some times their even share of the time left."""
    return context.within(max(_LEAST_CELL, _EVEN * context.clock.left() / cells_left))


def _engine(cells: Found, shape: Shape, context: Context, found: Found) -> None:
    """Every cell of a shape that fits, in all modes."""
    plain = random_model(context, found, shape)
    if plain is None:
        return
    model, pace = with_linear_block(plain), _pace(context, plain.spec, "engine")
    sizes = _cells(context)
    for number, each in enumerate(sizes):
        own = cell(cells, shape.name, each)
        held = with_room(context, model, each, own)
        if held is not None:
            share, prompts = share_of(context, len(sizes) - number), shifted_prompts(each.most, each.prompt)
            least = 0.0 if context.quick else max(LEAST, pace.needed(each))
            engine_in_context(share, own, held, prompts, MODES, each, least)
            pace.note(each, own, "engine")
    del model, plain
    give_back(context)


def with_room(context: Context, model: LoadedModel, sizes: Sizes, own: Found) -> LoadedModel | None:
    """The model, or, where that is what there is room for, the model with INT4 keys and values alone, or None."""
    for held in (model, replace(model, kv_formats=("int4",))):
        page_bytes = page_bytes_for(held.spec, held.dtype)
        longest = sizes.prompt + sizes.answer
        pages = max(-(-longest // held.kv_layout(each, page_bytes).page_tokens) for each in held.variants)
        needed = sizes.most * (pages + 1) * page_bytes + _BESIDE
        formats = " and ".join(held.kv_formats)
        what = f"engine, {model.name}, {sizes.most} x {sizes.prompt} in {formats} keys and values"
        if has_room(context, needed, what, own):
            return held
    return None


def _transformers(cells: Found, shape: Shape, context: Context, found: Found) -> None:
    """`generate` with a static cache in every cell of a shape that fits."""
    spec, name = shape.spec(), f"transformers on {shape.name}"
    if not has_room(context, weight_bytes(spec, "full") + _BESIDE, name, found):
        return
    with within_memory(context, name, found):
        theirs, pace = transformers_model(context, shape), _pace(context, spec, "transformers")
        sizes = _cells(context)
        for number, each in enumerate(sizes):
            share, own = share_of(context, len(sizes) - number), cell(cells, shape.name, each)
            _generate(share, own, theirs, pace, each)
            pace.note(each, own, "transformers")
            context.report.save()
        del theirs
    give_back(context)


def _generate(context: Context, own: Found, theirs: Any, pace: Pace, sizes: Sizes) -> None:
    called = f"transformers generate static, {sizes.most} streams"
    what = f"{called}, contexts of {sizes.prompt}"
    least = 0.0 if context.quick else pace.needed(sizes)
    if not context.fits(least, what, own) or not has_room(context, _their_bytes(pace.spec, sizes), what, own):
        return
    prompts = shifted_prompts(sizes.most, sizes.prompt)
    settings: Found = {"cache_implementation": "static", "disable_compile": True}
    with within_memory(context, what, own):
        measure = partial(generate_speed, context, theirs, prompts, sizes.answer, **settings)
        own[called] = tried(measure, LACKING)
    give_back(context)


def _their_bytes(spec: Architecture, sizes: Sizes) -> float:
    """Bytes of transformers' keys and values, and of the states of prompts that it reads in one piece."""
    tokens = sizes.most * sizes.prompt
    cache = sizes.most * (sizes.prompt + sizes.answer) * spec.blocks * 2 * spec.kv_size * 2
    return cache + tokens * spec.intermediate_size * 2 * _STATES / 2 + _BESIDE / 2


def _compiled(cells: Found, context: Context, found: Found) -> None:
    """The same compiled, in processes of their own."""
    if not context.cuda:
        found["skipped"] = ["transformers compiles its static cache on a GPU alone"]
        return
    for number, (shape, streams, tokens) in enumerate(COMPILED):
        sizes = Sizes((streams,), tokens, ANSWER)
        called = f"transformers generate compiled, {streams} streams"
        what, own = f"{shape.name}: {called}, contexts of {tokens}", cell(cells, shape.name, sizes)
        needed = weight_bytes(shape.spec(), "full") + _their_bytes(shape.spec(), sizes)
        if context.fits(LEAST_COMPILED, what, own) and has_room(context, needed, what, own):
            share = context.within(max(LEAST_COMPILED, 2 * context.clock.left() / (len(COMPILED) - number)))
            own[called] = compiled_apart(share, shape.name, streams, sizes)
            context.report.save()
