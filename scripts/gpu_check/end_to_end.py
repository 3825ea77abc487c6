"""The engine's tokens per second beside transformers' `generate` and `generate_batch`, same prompts, same run.

What is timed is warm: the engine has run the load until no further CUDA graph was captured, transformers once.

The packaged model in every mode, and the shapes of two known models with random weights (speed only), there also with
a synthetic exit in their middle, which lets a stated share of the tokens leave. Where no calibration has fitted one,
the linear block is synthetic too: random, of the rank that a calibration would choose. In the packaged model the
engine's own answers are checked too: greedy ones against a plain decoding loop, drawn ones alone against the same in a
crowd, and with a bundle those of the verified mode against exits off. Exits have a section too (`exit_answers`).

The parts come in the order of what they are worth. Each has its own seconds, and what does not fit is named.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from exeunt.compression.exits import ExitHead
from exeunt.compression.memory import free_bytes
from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.tokenizer import load_tokenizer
from exeunt.compression.variant import Variant, WeightFormat
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.engine_speeds import (
    BACKFILLED,
    FULL,
    HALF,
    INT4,
    LEAST,
    LINEAR,
    OFF,
    VERIFIED,
    Modes,
    engine_driver,
    engine_speeds,
)
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY, Decoders, Shape, packaged_decoders, random_decoders
from scripts.gpu_check.needs import BUNDLE, missing
from scripts.gpu_check.paged_loads import PagedLoads
from scripts.gpu_check.paged_rows import greedy
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.prompts import packaged_prompts
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import FORMATS, give_back, has_room, held_formats, weight_bytes
from scripts.gpu_check.sizes import LARGE_SIZES, PACKAGED_SIZES, QUICK_SIZES, SMALL_SIZES, Sizes
from scripts.gpu_check.synthetic_block import with_linear_block
from scripts.gpu_check.synthetic_exit import WANTED, rated_prompts, synthetic_exit, with_rate
from scripts.gpu_check.transformers_speeds import (
    packaged_of_transformers,
    transformers_model,
    transformers_speeds,
)

_CROWD = 17
_BESIDE = 4e9  # bytes beside the weights of a transformers model: its keys and values, and prompts' states
SYNTHETIC = "(synthetic)"
PACKAGED_MODES: Modes = {
    "full/full": (FULL, OFF),
    "int4/int4": (INT4, OFF),
    "int4/int4 verified": (INT4, VERIFIED),
    "int4/int4 exits at 0.5": (INT4, HALF),
}
MORE_PACKAGED_MODES: Modes = {
    "int4/int4 backfilled exits at 0.5": (INT4, BACKFILLED),
    "full/full verified": (FULL, VERIFIED),
    "full/int4": (Variant("full", "int4"), OFF),
    "int4/full": (Variant("int4", "full"), OFF),
}
LINEAR_MODE: Modes = {"int4/int4 linear block": (LINEAR, OFF)}
SYNTHETIC_LINEAR_MODE: Modes = {f"int4/int4 linear block {SYNTHETIC}": (LINEAR, OFF)}
RANDOM_MODES: Modes = {
    "int4/int4": (INT4, OFF),
    f"int4/int4 exits at 0.5 {SYNTHETIC}": (INT4, HALF),
    "full/full": (FULL, OFF),
    f"int4/int4 verified {SYNTHETIC}": (INT4, VERIFIED),
    f"int4/int4 backfilled exits at 0.5 {SYNTHETIC}": (INT4, BACKFILLED),
    **SYNTHETIC_LINEAR_MODE,
}


def run(context: Context, found: Found) -> None:
    """Every part that fits."""
    packaged, large, small = QUICK_SIZES if context.quick else (PACKAGED_SIZES, LARGE_SIZES, SMALL_SIZES)
    shapes = (TOY, replace(TOY, name="toy again")) if context.quick else (MISTRAL, LLAMA)
    first, second = (shape.name for shape in shapes)
    parts = (
        Part("packaged model", "packaged", 15, 6, partial(_packaged, sizes=packaged)),
        Part(
            "transformers on the packaged model",
            "packaged",
            15,
            5,
            partial(_transformers_packaged, sizes=packaged),
        ),
        Part(first, first, 28, 10, partial(_random, shape=shapes[0], sizes=large)),
        Part(
            f"transformers on {first}",
            first,
            27,
            10,
            partial(_transformers_random, shape=shapes[0], sizes=large),
        ),
        Part(second, second, 8, 6, partial(_random, shape=shapes[1], sizes=small)),
        Part("packaged model, more modes", "packaged", 11, 6, partial(_packaged_more, sizes=packaged)),
    )
    run_parts(context, found, parts)


def _packaged(context: Context, found: Found, sizes: Sizes) -> None:
    """The engine's answers and its speed in the modes that matter most."""
    model = packaged_model(context)
    found["gates"] = "calibrated" if model.exits else "no bundle: no exits"
    found["weights_sha256"] = hashlib.sha256((checkpoint() / "model.safetensors").read_bytes()).hexdigest()
    prompts = packaged_prompts(max(sizes.most, _CROWD), sizes.prompt)
    with torch.inference_mode():  # in front of the engine, which has decoders run as graphs from then on
        loops = {
            each: greedy(model.decoder(each), each.kv_cache, prompts[0], sizes.answer)
            for each in (FULL, INT4)
        }
    driver = engine_driver(model, sizes.load(len(prompts)))
    try:
        _same_answers(context, model, driver, prompts, loops, sizes)
        engine_speeds(context, found, model, driver, prompts, offered(model, PACKAGED_MODES, found), sizes)
    finally:
        driver.close()
        del driver, model
        give_back(context)


def _packaged_more(context: Context, found: Found, sizes: Sizes) -> None:
    """The engine in the other modes, and in turn: with no step begun before the host has the tokens in front."""
    plain = packaged_model(context)
    model = with_linear_block(plain)
    linear = LINEAR_MODE if model is plain else SYNTHETIC_LINEAR_MODE
    prompts = packaged_prompts(sizes.most, sizes.prompt)
    turns: Modes = {
        "int4/int4 steps in turn": (INT4, OFF),
        "full/full steps in turn": (FULL, OFF),
    }
    for modes, ahead in ((offered(model, {**MORE_PACKAGED_MODES, **linear}, found), True), (turns, False)):
        if not context.fits(LEAST, ", ".join(modes), found):
            continue
        driver = engine_driver(model, sizes.load(sizes.most), async_scheduling=ahead)
        try:
            engine_speeds(context, found, model, driver, prompts, modes, sizes)
        finally:
            driver.close()
            del driver
            give_back(context)


def offered(model: LoadedModel, modes: Modes, found: Found) -> Modes:
    """The modes that a model offers; those of exits that it has not are named in `found`.

    Those of weights that it does not hold are left out: who built the model has said why.
    """
    held = {name: mode for name, mode in modes.items() if mode[0] in model.variants}
    without = missing(BUNDLE)
    why = (
        f"opening a bundle takes {', '.join(without)}"
        if without
        else "there is no bundle, --bundle takes one"
    )
    found_exits = {name: mode for name, mode in held.items() if model.exits or mode[1] is OFF}
    if lacking := sorted(f"engine {name}: {why}" for name in held.keys() - found_exits):
        found.setdefault("skipped", []).extend(lacking)
    return found_exits


def _transformers_packaged(context: Context, found: Found, sizes: Sizes) -> None:
    prompts = packaged_prompts(sizes.most, sizes.prompt)
    transformers_speeds(context, found, packaged_of_transformers(context), prompts, sizes)
    give_back(context)


def packaged_model(context: Context) -> LoadedModel:
    """The bundle in bfloat16, or without one the checkpoint with its weights rounded to INT4 beside."""
    if context.bundle is not None:
        return load_bundle(context.bundle, device=context.device, dtype=torch.bfloat16)
    spec, decoders = packaged_decoders(context.device, torch.bfloat16)
    return _loaded(context, "packaged", spec, decoders)


def _loaded(
    context: Context, name: str, spec: Any, decoders: Decoders, exits: tuple[ExitHead, ...] = ()
) -> LoadedModel:
    """A model for the engine. Its texts are spelt by the packaged model's tokenizer, whatever they are."""
    return LoadedModel(
        name=name,
        spec=spec,
        tokenizer=load_tokenizer(checkpoint()),
        decoders=decoders,
        kv_formats=("full", "int4"),
        exits=exits,
        manifest=None,
        device=context.device,
        dtype=torch.bfloat16,
    )


def _same_answers(
    context: Context,
    model: LoadedModel,
    driver: PagedLoads,
    prompts: Sequence[Sequence[int]],
    loops: Mapping[Variant, Sequence[int]],
    sizes: Sizes,
) -> None:
    """The engine's answers must not depend on how they come about; `loops` are those of a plain decoding loop."""
    for variant, loop in loops.items():
        one = driver.run(prompts[:1], variant, OFF, sizes.load(1))[0].ids
        _alike(context, f"engine {variant.short_name}: greedy answer is the decoding loop's", one, loop)
        drawn = sizes.load(1, temperature=0.8)
        alone = driver.run(prompts[:1], variant, OFF, drawn)[0].ids
        crowd = driver.run(prompts[:_CROWD], variant, OFF, replace(drawn, concurrency=_CROWD))[0].ids
        _alike(
            context, f"engine {variant.short_name}: drawn answer alone is that among {_CROWD}", alone, crowd
        )
        if model.exits:
            verified = driver.run(prompts[:1], variant, VERIFIED, sizes.load(1))[0].ids
            _alike(
                context, f"engine {variant.short_name}: verified answer is that of exits off", verified, one
            )


def _alike(context: Context, name: str, ours: Sequence[int], wanted: Sequence[int]) -> None:
    first = next((i for i, (a, b) in enumerate(zip(ours, wanted, strict=False)) if a != b), None)
    context.report.check(
        name, list(ours) == list(wanted), tokens=len(ours), wanted=len(wanted), first_apart=first
    )


def random_model(
    context: Context,
    found: Found,
    shape: Shape,
    *,
    blocks: int | None = None,
    rate: float | None = WANTED,
    formats: tuple[WeightFormat, ...] = FORMATS,
) -> LoadedModel | None:
    """A shape with random weights and a synthetic exit half-way, which lets a share `rate` leave (None: any share).

    `blocks` are in place of the shape's own number of them. Its weights are in those of the `formats` that the device
    has room for, and None where it has for none: `found` says so.
    """
    spec = shape.spec() if blocks is None else shape.spec(blocks=blocks)
    held = held_formats(context, spec, f"{shape.name} with random weights", found, formats)
    if not held:
        return None
    decoders = random_decoders(spec, context.device, torch.bfloat16, formats=held)
    head = synthetic_exit(spec, context.device)
    found["gates"] = f"synthetic, after block {head.block} of {spec.blocks}"
    if rate is not None:
        prompts = rated_prompts(context)
        head = with_rate(head, decoders["int4", False], "int4", prompts, rate)
        found["wanted_exit_rate"] = rate
    give_back(context)
    found["free_bytes"] = free_bytes(context.device)
    return _loaded(context, shape.name, spec, decoders, (head,))


def _random(context: Context, found: Found, shape: Shape, sizes: Sizes) -> None:
    """A shape without exits, with the synthetic one in every mode, and with a synthetic linear block."""
    plain = random_model(context, found, shape)
    if plain is None:
        return
    model = with_linear_block(plain)
    driver = engine_driver(model, sizes.load(sizes.most))
    try:
        prompts = driver.prompts(sizes.most, sizes.prompt)
        engine_speeds(context, found, model, driver, prompts, offered(model, RANDOM_MODES, found), sizes)
    finally:
        driver.close()
        del driver, model, plain
        give_back(context)


def _transformers_random(context: Context, found: Found, shape: Shape, sizes: Sizes) -> None:
    needed = weight_bytes(shape.spec(), "full") + _BESIDE
    if not has_room(context, needed, f"transformers on {shape.name}", found):
        return
    prompts = packaged_prompts(sizes.most, sizes.prompt)
    transformers_speeds(context, found, transformers_model(context, shape), prompts, sizes)
    give_back(context)
