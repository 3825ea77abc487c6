"""The engine's tokens per second beside transformers' `generate` and `generate_batch`, same prompts, same run.

What is timed is warm: the engine has run the load until no further CUDA graph was captured, transformers once.

The packaged model in every mode, and the shapes of two known models with random weights (speed only), there also with
a synthetic exit in their middle, which lets a stated share of the tokens leave. In the packaged model the engine's own
answers are checked too: greedy ones against a plain decoding loop, drawn ones alone against the same in a crowd, and
those of the verified mode against exits off.

The parts come in the order of what they are worth. Each has its own seconds, and what does not fit is named.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from exeunt.compression.exits import ExitHead
from exeunt.compression.memory import free_bytes
from exeunt.compression.model import LoadedModel, load_bundle
from exeunt.compression.tokenizer import load_tokenizer
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.engine_speeds import (
    BACKFILLED,
    FULL,
    HALF,
    INT4,
    LEAST,
    OFF,
    VERIFIED,
    Modes,
    Sizes,
    engine_speeds,
    free_memory,
)
from scripts.gpu_check.models import LLAMA, MISTRAL, TOY, Decoders, Shape, packaged_decoders, random_decoders
from scripts.gpu_check.paged_rows import greedy
from scripts.gpu_check.parts import Part, run_parts
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.synthetic_exit import WANTED, synthetic_exit, with_rate

_CROWD = 17
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
RANDOM_MODES: Modes = {
    "int4/int4": (INT4, OFF),
    f"int4/int4 exits at 0.5 {SYNTHETIC}": (INT4, HALF),
    "full/full": (FULL, OFF),
    f"int4/int4 verified {SYNTHETIC}": (INT4, VERIFIED),
    f"int4/int4 backfilled exits at 0.5 {SYNTHETIC}": (INT4, BACKFILLED),
}
PACKAGED_SIZES, LARGE_SIZES, SMALL_SIZES = (
    Sizes((64, 1, 16), 64, 64),
    Sizes((64, 1, 16), 256, 64),
    Sizes((16, 1, 64), 256, 64),
)
_QUICK_SIZES = (Sizes((2, 1), 16, 4), Sizes((1, 2), 16, 4), Sizes((2,), 16, 4))


def run(context: Context, found: Found) -> None:
    """Every part that fits."""
    packaged, large, small = _QUICK_SIZES if context.quick else (PACKAGED_SIZES, LARGE_SIZES, SMALL_SIZES)
    shapes = (TOY, replace(TOY, name="toy again")) if context.quick else (MISTRAL, LLAMA)
    first, second = (shape.name for shape in shapes)
    parts = (
        Part("packaged model", "packaged", 24, 6, partial(_packaged, sizes=packaged)),
        Part(
            "transformers on the packaged model",
            "packaged",
            24,
            5,
            partial(_transformers_packaged, sizes=packaged),
        ),
        Part(first, first, 34, 10, partial(_random, shape=shapes[0], sizes=large)),
        Part(
            f"transformers on {first}",
            first,
            30,
            10,
            partial(_transformers_random, shape=shapes[0], sizes=large),
        ),
        Part(second, second, 14, 6, partial(_random, shape=shapes[1], sizes=small)),
        Part("packaged model, more modes", "packaged", 14, 6, partial(_packaged_more, sizes=packaged)),
    )
    run_parts(context, found, parts)


def _packaged(context: Context, found: Found, sizes: Sizes) -> None:
    """The engine's answers and its speed in the modes that matter most."""
    model = packaged_model(context)
    found["gates"] = "calibrated" if model.exits else "no bundle: no exits"
    found["weights_sha256"] = hashlib.sha256((checkpoint() / "model.safetensors").read_bytes()).hexdigest()
    prompts = prompts_of(model.tokenizer, max(sizes.most, _CROWD), sizes.prompt)
    with torch.inference_mode():  # in front of the engine, which has decoders run as graphs from then on
        loops = {
            each: greedy(model.decoder(each), each.kv_cache, prompts[0], sizes.answer)
            for each in (FULL, INT4)
        }
    driver = engine_driver(model, sizes.load(len(prompts)))
    try:
        _same_answers(context, model, driver, prompts, loops, sizes)
        engine_speeds(context, found, model, driver, prompts, _offered(model, PACKAGED_MODES, found), sizes)
    finally:
        driver.close()
        del driver, model
        free_memory(context)


def _packaged_more(context: Context, found: Found, sizes: Sizes) -> None:
    """The engine in the other modes, and in turn: with no step begun before the host has the tokens in front."""
    model = packaged_model(context)
    prompts = prompts_of(model.tokenizer, sizes.most, sizes.prompt)
    turns: Modes = {
        "int4/int4 steps in turn": (INT4, OFF),
        "full/full steps in turn": (FULL, OFF),
    }
    for modes, ahead in ((_offered(model, MORE_PACKAGED_MODES, found), True), (turns, False)):
        if not context.fits(LEAST, ", ".join(modes), found):
            continue
        driver = engine_driver(model, sizes.load(sizes.most), async_scheduling=ahead)
        try:
            engine_speeds(context, found, model, driver, prompts, modes, sizes)
        finally:
            driver.close()
            del driver
            free_memory(context)


def _offered(model: LoadedModel, modes: Modes, found: Found) -> Modes:
    """The modes that a model offers: without exits those that have none, the others named in `found`."""
    offered = {name: mode for name, mode in modes.items() if model.exits or mode[1] is OFF}
    lacking = [f"engine {name}: there is no bundle, --bundle takes one" for name in modes.keys() - offered]
    if lacking:
        found.setdefault("skipped", []).extend(sorted(lacking))
    return offered


def _transformers_packaged(context: Context, found: Found, sizes: Sizes) -> None:
    prompts = prompts_of(load_tokenizer(checkpoint()), sizes.most, sizes.prompt)
    _transformers(context, found, packaged_of_transformers(context), prompts, sizes)
    free_memory(context)


def packaged_of_transformers(context: Context) -> Any:
    """The packaged model as transformers has it, in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
    return model.to(context.device).eval()


def prompts_of(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Passages of the packaged text."""
    return cut_prompts(lambda text: list(tokenizer.encode(text, verbose=False)), count, tokens)


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
    driver: EngineDriver,
    prompts: Sequence[Sequence[int]],
    loops: Mapping[Variant, Sequence[int]],
    sizes: Sizes,
) -> None:
    """The engine's answers must not depend on how they come about; `loops` are those of a plain decoding loop."""
    for variant, loop in loops.items():
        ask = {**asdict(variant), "early_exit": OFF}
        one = driver.run(prompts[:1], ask, sizes.load(1))[0].ids
        _alike(context, f"engine {variant.short_name}: greedy answer is the decoding loop's", one, loop)
        drawn = sizes.load(1, temperature=0.8)
        alone = driver.run(prompts[:1], ask, drawn)[0].ids
        many = driver.run(prompts[:_CROWD], ask, replace(drawn, concurrency=_CROWD))
        crowd = many[0].ids
        _alike(
            context, f"engine {variant.short_name}: drawn answer alone is that among {_CROWD}", alone, crowd
        )
        if model.exits:
            verified = driver.run(prompts[:1], {**ask, "early_exit": VERIFIED}, sizes.load(1))[0].ids
            _alike(
                context, f"engine {variant.short_name}: verified answer is that of exits off", verified, one
            )


def _alike(context: Context, name: str, ours: Sequence[int], wanted: Sequence[int]) -> None:
    first = next((i for i, (a, b) in enumerate(zip(ours, wanted, strict=False)) if a != b), None)
    context.report.check(
        name, list(ours) == list(wanted), tokens=len(ours), wanted=len(wanted), first_apart=first
    )


def _transformers(
    context: Context, found: Found, model: Any, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """`generate_batch`, then `generate` on as many prompts at once; what raises is noted and is no failure of ours."""
    called = f"transformers generate_batch, {sizes.most} streams"
    if context.cuda and context.fits(8, called, found):
        found[called] = tried(lambda: _generate_batch(model, prompts[: sizes.most], sizes.answer))
        context.report.save()
    for streams in sizes.streams:
        called = f"transformers generate, {streams} streams"
        if context.fits(5, called, found):
            found[called] = tried(
                lambda count=streams: generate_speed(context, model, prompts[:count], sizes.answer)
            )
            context.report.save()


def tried(measure: Any) -> Found:
    try:
        found: Found = measure()
    except Exception as error:  # noqa: BLE001 - theirs, or too little memory for it: the rest goes on
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


@torch.inference_mode()
def generate_speed(
    context: Context, model: Any, prompts: Sequence[Sequence[int]], answer: int, **settings: Any
) -> Found:
    ids = torch.tensor([list(prompt) for prompt in prompts], device=context.device)
    asked = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}

    def seconds(tokens: int) -> float:
        _wait(context)
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **asked)
        _wait(context)
        return time.perf_counter() - began

    # what is compiled is compiled for the length of the cache, and a second time when graphs are recorded
    lengths = (answer, answer) if settings else (2,)
    first = [seconds(tokens) for tokens in lengths]
    found: Found = {"warm_up_seconds": first}
    if context.clock.left() < first[-1]:
        return found | {"error": "no time left behind the warm-up"}
    took = seconds(answer)
    return found | {"tokens_per_s": len(prompts) * answer / took, "seconds": took}


def _generate_batch(model: Any, prompts: Sequence[Sequence[int]], answer: int) -> Found:
    """Continuous batching with its own choice of graphs; its set-up is in the first run alone.

    Not in inference mode: its thread writes to what is made here.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    asked = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(max_memory_percent=0.5)
    took, made = [], 0
    for _ in range(2):
        began = time.perf_counter()
        answers = model.generate_batch(
            inputs=[list(prompt) for prompt in prompts],
            generation_config=asked,
            continuous_batching_config=cache,
            persistent_manager=True,
        )
        took.append(time.perf_counter() - began)
        made = sum(len(each.generated_tokens) for each in answers.values())
    model.destroy_cached_continuous_batching_manager()
    return {"tokens_per_s": made / took[1], "tokens": made, "seconds": took[1], "first_run_seconds": took[0]}


def random_model(
    context: Context, found: Found, shape: Shape, blocks: int | None = None, rate: float | None = WANTED
) -> LoadedModel:
    """A shape with random weights and a synthetic exit half-way, which lets a share `rate` leave (None: any share).

    `blocks` are in place of the shape's own number of them.
    """
    spec = shape.spec() if blocks is None else shape.spec(blocks=blocks)
    decoders = random_decoders(spec, context.device, torch.bfloat16)
    head = synthetic_exit(spec, context.device)
    found["gates"] = f"synthetic, after block {head.block} of {spec.blocks}"
    if rate is not None:
        prompts = prompts_of(load_tokenizer(checkpoint()), 16, 64)
        head = with_rate(head, decoders["int4", False], "int4", prompts, rate)
        found["wanted_exit_rate"] = rate
    free_memory(context)
    found["free_bytes"] = free_bytes(context.device)
    return _loaded(context, shape.name, spec, decoders, (head,))


def _random(context: Context, found: Found, shape: Shape, sizes: Sizes) -> None:
    """A shape without exits, and with the synthetic one in every mode."""
    model = random_model(context, found, shape)
    driver = engine_driver(model, sizes.load(sizes.most))
    try:
        prompts = driver.prompts(sizes.most, sizes.prompt)
        engine_speeds(context, found, model, driver, prompts, RANDOM_MODES, sizes)
    finally:
        driver.close()
        del driver, model
        free_memory(context)


def _transformers_random(context: Context, found: Found, shape: Shape, sizes: Sizes) -> None:
    prompts = prompts_of(load_tokenizer(checkpoint()), sizes.most, sizes.prompt)
    _transformers(context, found, transformers_model(context, shape), prompts, sizes)
    free_memory(context)


def transformers_model(context: Context, shape: Shape) -> Any:
    """The shape as a transformers model in bfloat16 with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(context.device):
            model = AutoModelForCausalLM.from_config(shape.config(), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def _wait(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()
