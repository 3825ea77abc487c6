"""What exits cost on the machine at hand: measured, because sizes of matrices mislead.

A block's time is its weights and its attention, an INT4 projection costs a quarter of a full one, and few rows cost
nearly what one costs: none of it can be read off a parameter count. Each part is timed on a decode batch, in turn with
the others so that a drifting machine moves them alike. Of its times the shortest counts, for whatever else the machine
does only adds to them, and only ratios leave this file.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from exeunt.calibration.drafting_choice import DEEP_TOKENS, PassCosts
from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.sequence_batch import SequenceBatch, batches
from exeunt.calibration.shortlist_choice import shortlist_sizes
from exeunt.calibration.teacher_forcing import ForcedModel
from exeunt.compression.exit_output import Shortlist

ROWS: Final = 8
"""Sequences of the decode batch that leaving early is timed on; drafts are timed on one."""
CONTEXT: Final = 256
"""Tokens that each has behind it, or as many as the model takes."""
ROUNDS: Final = 15

Parts = dict[str, Callable[[], object]]


@torch.inference_mode()
def measure_exit_costs(model: ForcedModel) -> ExitCosts:
    """The time of gate, looks and skipped keys and values over that of a block of `model`.

    Looks are timed as they happen, by gates that look at everybody and let nobody go: at the whole vocabulary, at the
    shortlist that the exit has, and at those it might have.
    """
    decoder, head, device = model.decoder, model.exits[-1], model.decoder.device
    batch, context = _context(model, ROWS)
    last = (batch.positions == context - 1).nonzero().squeeze(1)
    geometry, pages = batch.geometry(model.layout.page_tokens, last), model.pages(batch)
    hidden = decoder.embed(batch.token_ids[last], geometry.positions)
    blocks, nobody = model.blocks, torch.full((ROWS,), torch.inf, device=device)
    looks = _looks(model, hidden)
    parts: Parts = {
        "blocks": lambda: decoder.run_blocks(hidden, geometry, pages, 0, blocks),
        "gate": lambda: head.gate(hidden, nobody, decoder.project_exit),
        "skipped_kv": lambda: decoder.project_kv(hidden, geometry, pages, 0, blocks),
        **{_look_name(size): look for size, look in looks.items()},
    }
    seconds = _in_turn(parts, device)
    block = seconds["blocks"] / blocks
    look = _beyond(seconds, looks, block)
    return ExitCosts(
        gate=seconds["gate"] / block,
        projection=look.pop(None),
        skipped_kv=seconds["skipped_kv"] / blocks / block,
        looks=tuple((size, cost) for size, cost in look.items() if size is not None),
    )


@torch.inference_mode()
def measure_pass_costs(model: ForcedModel, depths: Sequence[int]) -> PassCosts:
    """The times of drafts at exits behind `depths` blocks, one stream, over that of a token without drafts.

    Runs of blocks are taken to cost a call and so much for each block; that is fitted to one block and to all of them.
    """
    decoder, head, device, blocks = model.decoder, model.exits[-1], model.decoder.device, model.blocks
    parts: Parts = {}
    batch, context = _context(model, 1)
    counts = [min(tokens, context) for tokens in DEEP_TOKENS]
    for tokens in counts:
        parts |= _pass_parts(model, batch, tokens)
    geometry, pages = batch.geometry(model.layout.page_tokens, _last(batch, 1)), model.pages(batch)
    ids = batch.token_ids[_last(batch, 1)]
    hidden = decoder.embed(ids, geometry.positions)
    nobody, looks = torch.full((1,), torch.inf, device=device), _looks(model, hidden)
    parts |= {
        "embedding": lambda: decoder.embed(ids, geometry.positions),
        "block": lambda: decoder.run_blocks(hidden, geometry, pages, 0, 1),
        "gate": lambda: head.gate(hidden, nobody, decoder.project_exit),
        **{_look_name(size): look for size, look in looks.items()},
    }
    seconds = _in_turn(parts, device)
    per_block = (seconds["blocks 1"] - seconds["block"]) / max(1, blocks - 1)
    call = max(0.0, seconds["block"] - per_block)
    token = seconds["embedding"] + seconds["blocks 1"] + seconds["head 1"]

    def part(tokens: int, depth: int) -> float:
        return call + max(0.0, seconds[f"blocks {tokens}"] - call) * depth / blocks

    look = _beyond(seconds, looks, token)
    return PassCosts(
        gate=seconds["gate"] / token,
        projection=look.pop(None),
        shallow={depth: (seconds["embedding"] + part(1, depth)) / token for depth in depths},
        deep={
            depth: tuple((part(n, blocks - depth) + seconds[f"head {n}"]) / token for n in counts)
            for depth in depths
        },
        looks=tuple((size, cost) for size, cost in look.items() if size is not None),
    )


def _looks(model: ForcedModel, hidden: torch.Tensor) -> dict[int | None, Callable[[], object]]:
    """Gates that look at every row of `hidden` in vain, by the size of their shortlist; None: the whole vocabulary."""
    head, project, vocab = model.exits[-1], model.decoder.project_exit, model.decoder.spec.vocab_size
    never = torch.full((len(hidden),), 2.0, device=hidden.device)  # more than any confidence
    own = () if head.shortlist is None else (len(head.shortlist),)
    found: dict[int | None, Callable[[], object]] = {}
    for size in (None, *sorted({*shortlist_sizes(vocab), *own})):
        ids = None if size is None else Shortlist(torch.arange(size, device=hidden.device))
        look = replace(head, screen_ratio=0.0, shortlist=ids, confirmation=None)
        found[size] = partial(look.gate, hidden, never, project)
    return found


def _look_name(size: int | None) -> str:
    return "look" if size is None else f"look at {size}"


def _beyond(seconds: dict[str, float], sizes: Iterable[int | None], unit: float) -> dict[int | None, float]:
    """What each look takes beyond a gate that looks at nobody, in units of `unit` seconds."""
    return {size: max(0.0, seconds[_look_name(size)] - seconds["gate"]) / unit for size in sizes}


def _pass_parts(model: ForcedModel, batch: SequenceBatch, tokens: int) -> Parts:
    """All blocks, and the final head, for the last `tokens` tokens of a batch of one row."""
    decoder, last = model.decoder, _last(batch, tokens)
    geometry, pages = batch.geometry(model.layout.page_tokens, last), model.pages(batch)
    hidden = decoder.embed(batch.token_ids[last], geometry.positions)
    return {
        f"blocks {tokens}": lambda: decoder.run_blocks(hidden, geometry, pages, 0, model.blocks),
        f"head {tokens}": lambda: decoder.head(hidden),
    }


def _context(model: ForcedModel, rows: int) -> tuple[SequenceBatch, int]:
    """A batch of `rows` rows of `CONTEXT` tokens, and how many tokens these are."""
    context = min(CONTEXT, model.decoder.spec.max_position_embeddings)
    texts = [torch.zeros(context, dtype=torch.int64)] * rows
    return next(batches(texts, rows * context, model.decoder.device)), context


def _last(batch: SequenceBatch, tokens: int) -> torch.Tensor:
    return torch.arange(batch.tokens - tokens, batch.tokens, device=batch.token_ids.device)


def _in_turn(parts: Parts, device: torch.device) -> dict[str, float]:
    """The shortest seconds of each part."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            part()
            _wait(device)
            began = time.perf_counter()
            part()
            _wait(device)
            times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
