"""The packaged model on the device: against transformers, against plain PyTorch, and against itself in other company.

Greedy answers come from the decoder, token by token, behind random tokens and behind passages of a text. They are held
to transformers on the same weights, and to the decoder without the Triton kernels (full and INT4 weights, full and INT4
keys and values); what is compared of several texts is the worst of them. Row invariance is held to
the bit: a text alone in one piece, in chunks, token by token, among others, backfilled, with tokens read once more
behind their successors, and in passes of every size that CUDA graphs are captured for. All variants in bfloat16 come
first; float32 is a section of its own. A check that the time did not suffice for says what it compared.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.variant import KVFormat, Variant
from exeunt.deploy.packaged_model import path as checkpoint
from exeunt.kernels import gpu
from scripts.gpu_check.bits import check_bits
from scripts.gpu_check.models import packaged_decoders
from scripts.gpu_check.paged_rows import backfilled_logits, greedy, logits_of, rewritten_logits
from scripts.gpu_check.pass_sizes import check_sizes
from scripts.gpu_check.prompts import packaged_prompts
from scripts.gpu_check.report import Context, Found

VARIANTS = (Variant(), Variant("int4", "int4"), Variant("full", "int4"), Variant("int4", "full"))
COMPANY, _QUICK_COMPANY = {2: 0, 17: 8}, {2: 0, 5: 3}
"""Texts side by side in one call, by the place of the one that is looked at."""
CHUNKS = (290, 1, 1, 7, 16, 33, 64, 600)
"""Tokens of a text's calls: both sides of the edges of the tiles' row counts, the last up to the text's end."""
GAPS = (2, 7, 23, 61, 62, 290, 431)
"""Positions of tokens that are read once more when all of their successors are there."""
_OWED = 8  # tokens that wait in front of deeper blocks at most, as an engine's
_PROMPT, _TOKENS = 64, 64
_PASSAGES = 3  # of the packaged text, beside a prompt of random tokens
_LONG, _SHORT = 600, 24  # tokens: beyond one split of the context, and for calls of a token each

MARGINS = {torch.float32: 2e-3, torch.bfloat16: 0.25}
"""How far below its largest logit another implementation may see our token: sums go in another order."""
_MARGIN_INT4_KV = 0.1  # a key on the edge between two codes may fall to either side
ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far, as a share of their norm, all logits of a text may be from another implementation's."""
_ERROR_INT4_KV = 0.02


def run(context: Context, found: Found) -> None:
    """Every variant in bfloat16, then the same as CUDA graphs."""
    _dtype(context, found, torch.bfloat16)


def float32(context: Context, found: Found) -> None:
    """The same in float32, with what time is left."""
    _dtype(context, found, torch.float32)


@torch.inference_mode()
def _dtype(context: Context, found: Found, dtype: torch.dtype) -> None:
    _, decoders = packaged_decoders(context.device, dtype)
    tokens = 8 if context.quick else _TOKENS
    prompts = _prompts(context, decoders["full", False])
    with without_triton():
        _, plain = packaged_decoders(context.device, dtype)
    for variant in VARIANTS:
        name = f"{_name(dtype)} {variant.short_name}"
        if not context.fits(2, name, found):
            continue
        decoder, kv = decoders[variant.weights, False], variant.kv_cache
        answers = [greedy(decoder, kv, prompt, tokens) for prompt in prompts]
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        margin, error = MARGINS[dtype], ERRORS[dtype]
        if variant == Variant():
            theirs = _transformers(context, dtype, texts)
            _held(context, f"{name} against transformers", theirs, answers, margin)
        with without_triton():
            theirs = _logits(plain[variant.weights, False], kv, texts)
        if kv == "int4":
            margin, error = max(margin, _MARGIN_INT4_KV), max(error, _ERROR_INT4_KV)
        _held(context, f"{name} against plain PyTorch", theirs, answers, margin)
        ours = _logits(decoder, kv, texts)
        off = _worst(
            float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True)
        )
        context.report.check(f"{name} logits against plain PyTorch", off < error, error=off, tolerance=error)
        found.setdefault("answers", {})[name] = answers
        context.report.save()
        _invariance(context, name, decoder, kv)
    for variant in VARIANTS:
        decoder, kv = decoders[variant.weights, False], variant.kv_cache
        name = f"{_name(dtype)} {variant.short_name}"
        if context.fits(2, f"{name} in CUDA graphs", found):
            _graphs(context, f"{name} in CUDA graphs", decoder, kv, found)
        if context.fits(2, f"{name} passes of every size", found):
            check_sizes(context, f"{name} passes of every size to the bit", decoder, kv)


def _held(
    context: Context,
    name: str,
    theirs: Sequence[Tensor],
    answers: Sequence[Sequence[int]],
    tolerance: float,
) -> None:
    """Every token of the answers must be the other's own choice, or within `tolerance` of it.

    `theirs` are the other's logits [tokens, vocab] of each text, whose last tokens are the answer.
    """
    behind: list[float] = []
    for text, answer in zip(theirs, answers, strict=True):
        logits = text[-len(answer) - 1 : -1].float()
        ours = torch.tensor(answer, device=logits.device)
        behind += (logits.max(-1).values - logits.gather(1, ours[:, None])[:, 0]).tolist()
    worst = _worst(behind)
    detail: dict[str, Any] = {"tokens": len(behind), "texts": len(answers), "worst_margin": worst}
    detail["chosen_alike"] = sum(each == 0 for each in behind)
    context.report.check(name, worst <= tolerance, **detail, tolerance=tolerance)


def _worst(numbers: Iterable[float]) -> float:
    """The largest, or what is no number, if there is such."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def _transformers(context: Context, dtype: torch.dtype, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits [tokens, vocab] that transformers sees of each text."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=dtype).to(context.device).eval()
    return [model(torch.tensor([text], device=context.device)).logits[0] for text in texts]


def _logits(decoder: Decoder, kv: KVFormat, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The decoder's logits [tokens, vocab] of each text, read in one piece and alone."""
    return [logits_of(decoder, kv, [text], [len(text)])[0] for text in texts]


def _invariance(context: Context, name: str, decoder: Decoder, kv: KVFormat) -> None:
    """A text's logits must be the same bits however it is cut and whoever is read beside it."""
    texts = _texts(context, decoder)
    long, short = texts[0], texts[0][:_SHORT]
    others = [text[: len(short) + 3 * index] for index, text in enumerate(texts[1:])]

    def beside(company: int, place: int, chunks: Sequence[int]) -> Tensor:
        rows = [*others[:place], short, *others[place : company - 1]]
        return logits_of(decoder, kv, rows, chunks)[place]

    ways: dict[str, Callable[[], Tensor]] = {
        f"in chunks of {CHUNKS}": lambda: logits_of(decoder, kv, [long], CHUNKS)[0],
        "token by token": lambda: logits_of(decoder, kv, [short], [1])[0],
    }
    gaps = [at for at in GAPS if at < len(long) - 1]
    ways["backfilled"] = lambda: backfilled_logits(decoder, kv, short, decoder.spec.blocks // 2, _OWED)
    ways["with gaps"] = lambda: rewritten_logits(decoder, kv, long, gaps, others[0])
    for company, place in (_QUICK_COMPANY if context.quick else COMPANY).items():
        ways[f"among {company}"] = partial(beside, company, place, [len(short) + 60])
        ways[f"among {company}, token by token"] = partial(beside, company, place, [len(short) // 2, 1])
    expected = logits_of(decoder, kv, [long], [len(long)])[0]
    check_bits(context, f"{name} row invariance to the bit", expected, ways)


def _graphs(context: Context, name: str, decoder: Decoder, kv: KVFormat, results: Found) -> None:
    """Passes replayed as CUDA graphs must leave the bits of passes without: a text too long for any is what counts."""
    texts = _texts(context, decoder)
    if decoder.capture(decoder.spec.max_position_embeddings) is None:
        results.setdefault("skipped", []).append(f"{name}: this device runs none")
        return
    expected = logits_of(decoder, kv, texts[:1], [_LONG])[0]
    short = texts[0][:_SHORT]
    rows = [text[: len(short) + 6] for text in texts[1:]]
    ways = {
        "token by token": lambda: logits_of(decoder, kv, [short], [1])[0],
        "in chunks": lambda: logits_of(decoder, kv, texts[:1], [290, 1, 1, 7, 16, 64, 221])[0],
        "among 17, token by token": lambda: logits_of(decoder, kv, [*rows[:8], short, *rows[8:]], [12, 1])[8],
    }
    check_bits(context, f"{name} to the bit", expected, ways)


def _prompts(context: Context, decoder: Decoder) -> list[list[int]]:
    """What greedy answers go on with: random tokens, and passages."""
    drawn = _texts(context, decoder)[0][:_PROMPT]
    return [drawn, *packaged_prompts(_PASSAGES, 16 if context.quick else _PROMPT)]


def _texts(context: Context, decoder: Decoder) -> list[list[int]]:
    """Random texts, the first of them long."""
    vocab, draw = decoder.spec.vocab_size, random.Random(5)
    long = 80 if context.quick else _LONG
    return [[draw.randrange(1, vocab) for _ in range(long if index == 0 else 100)] for index in range(17)]


@contextmanager
def without_triton() -> Iterator[None]:
    """Plain PyTorch on a GPU for what is built and run inside."""
    before = os.environ.get("EXEUNT_TRITON")
    os.environ["EXEUNT_TRITON"] = "0"
    gpu._runs_on.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del os.environ["EXEUNT_TRITON"]
        else:
            os.environ["EXEUNT_TRITON"] = before
        gpu._runs_on.cache_clear()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
