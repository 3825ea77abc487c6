"""A minimal user of the decoder for tests: whole sequences over sequential pages, prefill in chunks, greedy decode."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages, batch_of, kv_layout, page_bytes_for, sequential_pages
from exeunt.compression.variant import KVFormat
from exeunt.kernels.paged_batch import PagedBatch


@dataclass
class Sequences:
    """`rows` sequences that grow together through one decoder."""

    decoder: Decoder
    rows: int = 1
    max_tokens: int = 256
    format: KVFormat = "full"
    page_tokens: int = 5
    pages: KVPages = field(init=False)
    tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        decoder = self.decoder
        replaced = decoder.linear_block.index if decoder.linear_block is not None else None
        page_bytes = page_bytes_for(decoder.spec, decoder.dtype, self.page_tokens)
        layout = kv_layout(decoder.spec, self.format, decoder.dtype, page_bytes, replaced)
        self.pages, self.tables = sequential_pages(layout, self.rows, self.max_tokens, decoder.device)
        self.pages.arena.fill_(0xFF)  # NaN in every dtype: what was not written must not matter

    def batch(self, positions: list[range]) -> PagedBatch:
        return batch_of(positions, self.tables, self.pages.layout.page_tokens)

    def run(self, token_ids: Tensor, start: int) -> Tensor:
        """Hidden states behind the last block of one row's tokens at positions start, start + 1, …"""
        batch = self.batch([range(start, start + len(token_ids))])
        hidden = self.decoder.embed(token_ids, batch.positions)
        return self.decoder.run_blocks(hidden, batch, self.pages, 0, self.decoder.spec.blocks)


def chunked_logits(
    decoder: Decoder, token_ids: Tensor, chunks: list[int], format: KVFormat = "full"
) -> Tensor:
    """Logits [tokens, vocab] of one text, run in chunks of the given sizes and then token by token."""
    sequence = Sequences(decoder, max_tokens=len(token_ids), format=format)
    logits, start = [], 0
    with torch.inference_mode():
        while start < len(token_ids):
            size = chunks.pop(0) if chunks else 1
            logits.append(decoder.head(sequence.run(token_ids[start : start + size], start)))
            start += size
    return torch.cat(logits)


def greedy(decoder: Decoder, prompt: Tensor, new_tokens: int, chunk: int) -> list[int]:
    """The greedy continuation of a prompt that is prefilled `chunk` tokens at a time."""
    sequence = Sequences(decoder, max_tokens=len(prompt) + new_tokens)
    made: list[int] = []
    with torch.inference_mode():
        for start in range(0, len(prompt), chunk):
            hidden = sequence.run(prompt[start : start + chunk], start)
        made.append(int(decoder.head(hidden[-1:]).argmax()))
        while len(made) < new_tokens:
            hidden = sequence.run(torch.tensor(made[-1:]), len(prompt) + len(made) - 1)
            made.append(int(decoder.head(hidden).argmax()))
    return made
