"""transformers' continuous batching on the prompts that the engine is timed with: what `generate_batch` runs.

One manager answers the load several times, so that neither its set-up nor its thread's start and end are timed: from
the first prompt handed over to the last answer. Prompts are read anew each time, as the engine reads them. Tried twice:
with its own choice of CUDA graphs and of batches prepared ahead, both of which it turns off where attention needs a
mask (as SDPA does), and with graphs asked for. The better one is what is compared; both are told.
"""

import time
from collections.abc import Sequence
from typing import Any, Final

from scripts.gpu_check.held_memory import watched_memory
from scripts.gpu_check.report import Context, Found

_RUNS: Final = 3  # timed at most
_SHARE: Final = 0.5  # of the memory, for its keys and values
_PATIENCE: Final = 60.0  # seconds for one load, however much time there is
TRIES: Final[dict[str, Found]] = {"its own choice": {}, "graphs asked for": {"use_cuda_graph": True}}
"""Settings by what they are called."""


def generate_batch_speed(
    context: Context, model: Any, prompts: Sequence[Sequence[int]], answer: int
) -> Found:
    """The better of both tries, by its name under "chosen", with both under "tries".

    Raises what the first one raised where none ran.
    """
    tries: dict[str, Found] = {}
    first: Exception | None = None
    for number, (name, settings) in enumerate(TRIES.items()):
        own = context.within(context.clock.left() / (len(TRIES) - number))
        if tries and (own.clock.left() < 3 or _has_graphs(tries)):
            continue
        try:
            tries[name] = _one(own, model, prompts, answer, settings)
        except Exception as error:  # noqa: BLE001 - the other one may run
            tries[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            first = first or error
    ran = {name: each for name, each in tries.items() if "tokens_per_s" in each}
    if not ran and first is not None:
        raise first
    best = max(ran, key=lambda name: float(ran[name]["tokens_per_s"]))
    return {**ran[best], "chosen": best, "tries": tries}


def _has_graphs(tries: dict[str, Found]) -> bool:
    """Whether one that ran had all the graphs that can be asked for."""
    return any(each.get("use_cuda_graph") == [True, True] for each in tries.values())


def _one(
    context: Context, model: Any, prompts: Sequence[Sequence[int]], answer: int, settings: Found
) -> Found:
    """The best of a few loads behind a first one, and what the manager has decided on.

    Not in inference mode: the manager's thread writes to what is made here.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    asked = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sized = ContinuousBatchingConfig(max_memory_percent=_SHARE, allow_block_sharing=False, **settings)
    before = model.config._attn_implementation  # a manager sets its own
    began = time.perf_counter()
    try:
        with model.continuous_batching_context_manager(
            generation_config=asked, continuous_batching_config=sized, timeout=5, **_hints(prompts, answer)
        ) as manager:
            told = _decisions(model, manager)
            first = _load(context, manager, prompts, answer)
            ready = time.perf_counter() - began
            took: list[float] = []
            held: Found = {}
            while not took or (len(took) < _RUNS and context.clock.left() > 1.5 * took[-1]):
                seconds, held = watched_memory(context, lambda: _load(context, manager, prompts, answer))
                took.append(seconds)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    tokens = len(prompts) * answer
    return {
        "tokens_per_s": tokens / min(took),
        "tokens": tokens,
        "seconds": min(took),
        "all_seconds": took,
        "first_load_seconds": first,
        "seconds_until_warm": ready,
        **told,
        **held,
    }


def _load(context: Context, manager: Any, prompts: Sequence[Sequence[int]], answer: int) -> float:
    """Seconds from the first prompt to the last answer. Raises RuntimeError unless every answer is whole."""
    limit = time.monotonic() + min(_PATIENCE, max(10.0, 2 * context.clock.left()))
    began = time.perf_counter()
    manager.add_requests(inputs=[list(prompt) for prompt in prompts], max_new_tokens=answer)
    ended: list[Any] = []
    while len(ended) < len(prompts):
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError(f"its thread ended with {len(ended)} of {len(prompts)} answers")
            if time.monotonic() > limit:
                raise RuntimeError(f"{len(ended)} of {len(prompts)} answers came in time")
        elif result.is_finished() or getattr(result, "error", None) is not None:
            ended.append(result)
    took = time.perf_counter() - began
    check_whole(ended, len(prompts), answer)
    return took


def check_whole(answers: Sequence[Any], count: int, tokens: int) -> None:
    """Raise RuntimeError unless there are `count` answers of so many `tokens`, none of them with an error."""
    if errors := [str(each.error) for each in answers if getattr(each, "error", None) is not None]:
        raise RuntimeError(f"{len(errors)} of {count} answers failed: {errors[0]}"[:300])
    made = sum(len(each.generated_tokens) for each in answers)
    if len(answers) != count or made != count * tokens:
        raise RuntimeError(f"{made} tokens came in {len(answers)} answers, not {count * tokens} in {count}")


def _decisions(model: Any, manager: Any) -> Found:
    """What it runs with: how it attends, whether in graphs, whether batches are prepared ahead."""
    decided = getattr(manager, "continuous_batching_config", None)
    graphs = getattr(decided, "use_cuda_graph", None)
    return {
        "attention": model.config._attn_implementation,
        "use_cuda_graph": list(graphs) if isinstance(graphs, tuple) else graphs,
        "use_async_batching": getattr(decided, "use_async_batching", None),
    }


def _hints(prompts: Sequence[Sequence[int]], answer: int) -> Found:
    """What `generate_batch` tells a manager of the load, where this version knows it."""
    try:
        from transformers.generation.continuous_batching.utils import WorkloadHints
    except ImportError:
        return {}
    longest = max(map(len, prompts))
    hints = WorkloadHints(max_prompt_length=longest, max_generated_length=answer, num_requests=len(prompts))
    return {"workload_hints": hints}
