"""transformers' `generate` and `generate_batch` on the models and prompts that the engine is timed with."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from exeunt.deploy.packaged_model import path as checkpoint
from scripts.gpu_check.models import Shape
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.sizes import Sizes


def transformers_speeds(
    context: Context, found: Found, model: Any, prompts: Sequence[Sequence[int]], sizes: Sizes
) -> None:
    """`generate_batch`, then `generate` on as many prompts at once; what raises is noted and is no failure of ours."""
    called = f"transformers generate_batch, {sizes.most} streams"
    if context.cuda and context.fits(8, called, found):
        found[called] = tried(partial(_generate_batch, model, prompts[: sizes.most], sizes.answer))
        context.report.save()
    for streams in sizes.streams:
        called = f"transformers generate, {streams} streams"
        if context.fits(5, called, found):
            found[called] = tried(partial(generate_speed, context, model, prompts[:streams], sizes.answer))
            context.report.save()


def tried(measure: Callable[[], Found]) -> Found:
    """What is measured, or why nothing was."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - theirs, or too little memory for it: the rest goes on
        return {"error": f"{type(error).__name__}: {error}"[:300]}


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
