"""The engine's tokens per second beside transformers' `generate` and `generate_batch`, same prompts, same run.

What is timed is warm: the engine has run the load until no further CUDA graph was captured, transformers once.

The packaged model in every mode, and the Mistral-7B shape with random weights (speed only), there also with a
synthetic exit in its middle at which about half the tokens leave. In the packaged model the engine's own answers are
checked too: greedy ones against a plain decoding loop, drawn ones alone against the same in a crowd, and those of
the verified mode against exits off.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from exeunt.compression.exits import ExitHead, ExitProbe
from exeunt.compression.memory import free_bytes
from exeunt.compression.model import LoadedModel, load_bundle, load_tokenizer
from exeunt.compression.norm import Norm
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_engine import EngineDriver, engine_driver
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.engine_speeds import (
    FOR_TRANSFORMERS,
    FULL,
    HALF,
    INT4,
    LEAST,
    OFF,
    VERIFIED,
    Sizes,
    engine_speeds,
    free_memory,
)
from scripts.gpu_check.models import MISTRAL, TOY, Decoders, Shape, packaged_decoders, random_decoders
from scripts.gpu_check.paged_rows import greedy
from scripts.gpu_check.report import Context, Found

_CROWD = 17
SYNTHETIC = "(synthetic)"


def run(context: Context, found: Found) -> None:
    """The packaged model, then the large shape."""
    packaged = Sizes((2, 1), 16, 4) if context.quick else Sizes((64, 1, 16), 64, 64)
    if context.fits(8, "packaged model", found):
        _packaged(context.within(0.6 * context.clock.left()), found.setdefault("packaged", {}), packaged)
        free_memory(context)
    large = Sizes((1, 2), 16, 4) if context.quick else Sizes((64, 1, 16), 256, 64)
    shape = TOY if context.quick else MISTRAL
    if context.fits(15, shape.name, found):
        _random(context, found.setdefault(shape.name, {}), shape, large)
        free_memory(context)


def _packaged(context: Context, found: Found, sizes: Sizes) -> None:
    model = packaged_model(context)
    found["gates"] = "calibrated" if model.exits else "no bundle: no exits"
    found["weights_sha256"] = hashlib.sha256((checkpoint() / "model.safetensors").read_bytes()).hexdigest()
    prompts = _prompts(model, max(sizes.most, _CROWD), sizes.prompt)
    with torch.inference_mode():  # in front of the engine, which has decoders run as graphs from then on
        loops = {
            each: greedy(model.decoder(each), each.kv_cache, prompts[0], sizes.answer)
            for each in (FULL, INT4)
        }
    driver = engine_driver(model, sizes.load(len(prompts)))
    try:
        _same_answers(context, model, driver, prompts, loops, sizes)
        modes = {"full/full": (FULL, OFF), "int4/int4": (INT4, OFF)}
        if model.exits:
            modes["int4/int4 verified"] = (INT4, VERIFIED)
            modes["int4/int4 exits at 0.5"] = (INT4, HALF)
        engine_speeds(context, found, model, driver, prompts, modes, sizes)
    finally:
        driver.close()
    del driver
    _in_turn(context, found, model, prompts, sizes)
    del model
    free_memory(context)
    if context.fits(5, "transformers on the packaged model", found):
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
        _transformers(context, found, theirs.to(context.device).eval(), prompts, sizes)


def _prompts(model: LoadedModel, count: int, tokens: int) -> list[list[int]]:
    """Passages of the packaged text."""
    return cut_prompts(lambda text: list(model.tokenizer.encode(text, verbose=False)), count, tokens)


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


def _in_turn(
    context: Context, found: Found, model: LoadedModel, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """What steps gain that are begun before the host has the tokens in front: the same where none is."""
    called = "steps in turn"
    # another engine captures its graphs anew
    if not context.fits(LEAST if context.quick else 3 * LEAST + FOR_TRANSFORMERS, called, found):
        return
    driver = engine_driver(model, sizes.load(sizes.most), async_scheduling=False)
    try:
        modes = {f"int4/int4 {called}": (INT4, OFF), f"full/full {called}": (FULL, OFF)}
        engine_speeds(context, found, model, driver, prompts, modes, sizes)
    finally:
        driver.close()


def _transformers(
    context: Context, found: Found, model: Any, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """`generate_batch`, then `generate` on as many prompts at once; what raises is noted and is no failure of ours."""
    called = f"transformers generate_batch, {sizes.most} streams"
    if context.cuda and context.fits(8, called, found):
        found[called] = _tried(lambda: _generate_batch(model, prompts[: sizes.most], sizes.answer))
        context.report.save()
    for streams in sizes.streams:
        called = f"transformers generate, {streams} streams"
        if context.fits(5, called, found):
            found[called] = _tried(
                lambda count=streams: _generate(context, model, prompts[:count], sizes.answer)
            )
            context.report.save()


def _tried(measure: Any) -> Found:
    try:
        found: Found = measure()
    except Exception as error:  # noqa: BLE001 - theirs, or too little memory for it: the rest goes on
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


@torch.inference_mode()
def _generate(
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


def random_model(context: Context, found: Found, shape: Shape, blocks: int | None = None) -> LoadedModel:
    """A shape with random weights and a synthetic exit half-way; `blocks` in place of its own number of them."""
    spec = shape.spec() if blocks is None else shape.spec(blocks=blocks)
    decoders = random_decoders(spec, context.device, torch.bfloat16)
    found["gates"] = (
        f"synthetic, after block {spec.blocks // 2 - 1} of {spec.blocks}: about half the tokens leave"
    )
    free_memory(context)
    found["free_bytes"] = free_bytes(context.device)
    return _loaded(context, shape.name, spec, decoders, (_synthetic_exit(context, spec),))


def _random(context: Context, found: Found, shape: Shape, sizes: Sizes) -> None:
    """The large shape: INT4, full, INT4 with half the tokens leaving half-way."""
    model = random_model(context, found, shape)
    driver = engine_driver(model, sizes.load(sizes.most))
    try:
        prompts = driver.prompts(sizes.most, sizes.prompt)
        modes = {
            "int4/int4": (INT4, OFF),
            f"int4/int4 exits at 0.5 {SYNTHETIC}": (INT4, HALF),
            "full/full": (FULL, OFF),
        }
        engine_speeds(context, found, model, driver, prompts, modes, sizes)
    finally:
        driver.close()
    del driver
    _in_turn(context, found, model, prompts, sizes)
    del model
    free_memory(context)
    if context.fits(15, f"transformers on {shape.name}", found):
        _transformers(context, found, transformers_model(context, shape), prompts, sizes)


def _synthetic_exit(context: Context, spec: Any) -> ExitHead:
    """An exit half-way that passes the state on as it is; its gate is a random direction, so that half say yes."""
    hidden, units = spec.hidden_size, 64
    drawn = torch.Generator().manual_seed(3)
    probe = ExitProbe(
        torch.randn(units, hidden, generator=drawn) / hidden**0.5,
        torch.zeros(units),
        torch.randn(units, generator=drawn),
        torch.zeros(()),
    )
    norm = Norm(spec.norm, torch.ones(hidden), None, spec.norm_eps)
    combine = torch.tensor([1.0, 0.0, 0.0, 0.0])
    head = ExitHead(spec.blocks // 2 - 1, norm, torch.zeros(hidden, hidden), probe, combine, 0.0)
    return head.to(context.device, torch.bfloat16)


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


def compiled(context: Context, found: Found) -> None:
    """`generate` with a static cache, which transformers compiles on a GPU: one stream, the large shape."""
    shape = TOY if context.quick else MISTRAL
    if not context.cuda:
        found["skipped"] = ["transformers compiles its static cache on a GPU alone"]
        return
    model = transformers_model(context, shape)
    prompt = [list(range(1, 513))]
    found["generate static compiled, 1 stream"] = _tried(
        lambda: _generate(context, model, prompt, 64, cache_implementation="static")
    )
    context.report.save()


def _wait(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()
