"""Passes of every size that CUDA graphs are captured for: of one text's tokens, and of rows of one token each.

What a pass computes must be the bits of a pass too large for any graph. Each size is run full, and in the graph of its
size where the device runs graphs; a size that was not captured fails the check.
"""

import random
from functools import partial
from typing import Final

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.graph_pool import ROWS, TOKENS
from exeunt.compression.variant import KVFormat
from scripts.gpu_check.bits import check_bits
from scripts.gpu_check.paged_rows import PagedRows, logits_of
from scripts.gpu_check.report import Context

QUICK: Final = (1, 8, 24)
QUICK_ROWS: Final = 8
_BEYOND: Final = 64  # tokens more than the largest graph takes
_SHORTEST, _STEP, _SPREAD = 8, 11, 60  # tokens of rows: each has another number than the next


def check_sizes(context: Context, name: str, decoder: Decoder, kv: KVFormat) -> None:
    """Every size once, as many of them as there is time for; "graphs" says how many were captured on the way."""
    sizes = QUICK if context.quick else TOKENS
    graphs = decoder.capture(decoder.spec.max_position_embeddings)
    draw = random.Random(6)
    text = [draw.randrange(1, decoder.spec.vocab_size) for _ in range(sizes[-1] + _BEYOND)]
    expected = logits_of(decoder, kv, [text], [len(text)])[0]
    pages = PagedRows(decoder, kv, 1, sizes[-1])
    ways = {f"{size} tokens of a text": partial(_piece, pages, text[:size]) for size in sizes}
    check_bits(context, name, expected, ways, graphs=graphs)
    if context.clock.left() < 0:
        return
    rows = [size for size in sizes if size <= (QUICK_ROWS if context.quick else ROWS[-1])]
    texts = [text[at : at + _SHORTEST + _STEP * at % _SPREAD] for at in range(rows[-1])]
    own = PagedRows(decoder, kv, len(texts), _SHORTEST + _SPREAD)
    expected = _last_logits(own, texts)
    ways = {f"{size} rows of a token": partial(_rows, own, texts[:size]) for size in rows}
    check_bits(context, f"{name}, of rows", expected, ways, graphs=graphs)


def _piece(pages: PagedRows, text: list[int]) -> Tensor:
    """Logits [tokens, vocab] of a text read in one piece."""
    ids = torch.tensor(text, device=pages.decoder.device)
    return pages.logits(ids, pages.batch([0], [range(len(text))]))


def _last_logits(pages: PagedRows, texts: list[list[int]]) -> Tensor:
    """Logits [texts, vocab] behind each text, all read at once: more tokens than any graph takes."""
    ids = torch.tensor([token for text in texts for token in text], device=pages.decoder.device)
    batch = pages.batch(range(len(texts)), [range(len(text)) for text in texts])
    return pages.logits(ids, batch)[batch.query_starts[1:].long() - 1]


def _rows(pages: PagedRows, texts: list[list[int]]) -> Tensor:
    """Logits [texts, vocab] of each text's last token alone, all that stands before it being there."""
    ids = torch.tensor([text[-1] for text in texts], device=pages.decoder.device)
    return pages.logits(ids, pages.batch(range(len(texts)), [[len(text) - 1] for text in texts]))
