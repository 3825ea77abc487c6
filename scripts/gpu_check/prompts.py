"""The prompts that everything is timed with: passages of the packaged text."""

from exeunt.compression.tokenizer import load_tokenizer
from exeunt.deploy.bench_text import cut_prompts
from exeunt.deploy.packaged_model import path as checkpoint


def packaged_prompts(count: int, tokens: int) -> list[list[int]]:
    """So many prompts of so many tokens of the packaged model's tokenizer."""
    tokenizer = load_tokenizer(checkpoint())
    return cut_prompts(lambda text: list(tokenizer.encode(text, verbose=False)), count, tokens)
