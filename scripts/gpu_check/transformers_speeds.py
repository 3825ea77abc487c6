"""transformers' `generate` and `generate_batch` on the models and prompts that the engine is timed with.

Beside `generate` stands a loop of forward passes over a static cache of the same length, with nothing of `generate`
around it: a host's time that no such loop has is `generate`'s own.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.held_memory import watched_memory
from scripts.gpu_check.models import Shape
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import LACKING, give_back, within_memory
from scripts.gpu_check.sizes import Sizes

_RUNS: Final = 3  # timed at most
_MOST_BATCH, _MOST_GENERATE = 24.0, 11.0  # seconds of each at most: what is behind them needs some too
_PART: Final = 4  # one in so many of an answer's tokens are run by the loop of forward passes


def transformers_speeds(
    context: Context, found: Found, model: Any, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """`generate_batch`, then `generate` on as many prompts at once; what raises is noted and is no failure of ours."""
    from scripts.gpu_check.generate_batch import generate_batch_speed

    called = f"transformers generate_batch, {sizes.most} streams"
    if context.cuda and context.fits(8, called, found):
        own = context.within(min(_MOST_BATCH, max(8.0, context.clock.left() / 2)))
        load = partial(generate_batch_speed, own, model, prompts[: sizes.most], sizes.answer)
        with within_memory(context, called, found):
            found[called] = tried(load, LACKING)
        give_back(context)
        context.report.save()
    generate_speeds(context, found, model, prompts, sizes)


def generate_speeds(
    context: Context, found: Found, model: Any, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """`generate` by the number of streams, each with its share of the time."""
    for number, streams in enumerate(sizes.streams):
        called = f"transformers generate, {streams} streams"
        if not context.fits(5, called, found):
            continue
        share = context.clock.left() / (len(sizes.streams) - number)
        own = context.within(min(_MOST_GENERATE, max(5.0, share)))
        load = partial(generate_speed, own, model, prompts[:streams], sizes.answer, control=True)
        with within_memory(context, called, found):
            found[called] = tried(load, LACKING)
        give_back(context)
        context.report.save()


def tried(measure: Callable[[], Found], raised: tuple[type[Exception], ...] = ()) -> Found:
    """What is measured, or under "error" why nothing was; errors of the types `raised` are."""
    try:
        return measure()
    except raised:
        raise
    except Exception as error:  # noqa: BLE001 - theirs, or too little memory for it: the rest goes on
        return {"error": f"{type(error).__name__}: {error}"[:300]}


@torch.inference_mode()
def generate_speed(
    context: Context,
    model: Any,
    prompts: Sequence[Sequence[int]],
    answer: int,
    *,
    control: bool = False,
    **settings: Any,
) -> Found:
    """Tokens per second of the best of up to three runs of `generate`, behind warm ones of the same length.

    `settings` are further arguments of `generate`; with `control` the loop without it is timed too.
    """
    ids = torch.tensor([list(prompt) for prompt in prompts], device=context.device)
    asked = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids), **settings}

    def seconds() -> float:
        _wait(context)
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=answer, min_new_tokens=answer, **asked)
        _wait(context)
        return time.perf_counter() - began

    # what is compiled is compiled for the length of the cache, and a second time when graphs are recorded
    compiles = "cache_implementation" in settings and not settings.get("disable_compile")
    first = [seconds() for _ in range(2 if compiles else 1)]
    found: Found = {"warm_up_seconds": first}
    if context.clock.left() < first[-1]:
        return found | {"error": "no time left behind the warm-up"}
    took, held = watched_memory(context, seconds)
    all_took = [took]
    if control and context.clock.left() > all_took[0]:
        found["forward_loop"] = tried(partial(forward_loop_speed, context, model, ids, answer))
    while len(all_took) < _RUNS and context.clock.left() > 1.2 * all_took[-1]:
        all_took.append(seconds())
    best = min(all_took)
    found |= {"tokens_per_s": len(prompts) * answer / best, "seconds": best, "all_seconds": all_took}
    return found | held


@torch.inference_mode()
def forward_loop_speed(context: Context, model: Any, ids: Tensor, answer: int) -> Found:
    """The same number of greedy tokens behind `ids` [texts, tokens], by the model's forward passes alone.

    Its seconds are those of the prompt and of a few tokens, extended to the whole answer.
    """
    from transformers import StaticCache

    rows, prompt = ids.shape
    cache = StaticCache(config=model.config, max_cache_len=prompt + answer)

    def seconds(tokens: int) -> float:
        cache.reset()
        _wait(context)
        began = time.perf_counter()
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for at in range(prompt, prompt + tokens - 1):
            where = torch.full((1, 1), at, device=ids.device)
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(token, past_key_values=cache, use_cache=True, position_ids=where).logits
        logits[:, -1].argmax(-1)
        _wait(context)
        return time.perf_counter() - began

    few = min(answer, max(2, answer // _PART))
    seconds(2)  # makes the cache
    first, took = seconds(1), seconds(few)
    each = (took - first) / max(few - 1, 1)
    whole = first + (answer - 1) * each
    return {
        "tokens_per_s": rows * answer / whole,
        "seconds": whole,
        "prompt_seconds": first,
        "seconds_a_token": each,
        "tokens_run": few,
    }


def packaged_of_transformers(context: Context) -> Any:
    """The packaged model as transformers has it, in bfloat16."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
    return model.to(context.device).eval()


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
