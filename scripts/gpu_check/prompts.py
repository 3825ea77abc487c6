"""The prompts that everything is timed with: passages of the packaged text."""

from functools import lru_cache

from exeunt.compression.tokenizer import load_tokenizer
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.packaged_model import path as checkpoint


def packaged_prompts(count: int, tokens: int) -> list[list[int]]:
    """So many prompts of so many tokens of the packaged model's tokenizer."""
    tokenizer = load_tokenizer(checkpoint())
    return cut_prompts(lambda text: list(tokenizer.encode(text, verbose=False)), count, tokens)


def shifted_prompts(count: int, tokens: int) -> list[list[int]]:
    """The same from neighbouring places of one passage: many long ones take no longer to make than one."""
    passage = _passage(count + tokens)
    return [list(passage[at : at + tokens]) for at in range(count)]


@lru_cache(maxsize=4)
def _passage(tokens: int) -> tuple[int, ...]:
    return tuple(packaged_prompts(1, tokens)[0])
