"""A minimal user of the decoder for tests: whole sequences over sequential pages, prefill in chunks, greedy decode."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exeunt.compression.decode_graphs import padded_layout
from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVLayout, KVPages, kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.paged_batch import PagedBatch


def sequential_pages(
    layout: KVLayout, rows: int, max_tokens: int, device: torch.device
) -> tuple[KVPages, Tensor]:
    """Pages for `rows` sequences of up to `max_tokens` tokens, shuffled: (pages, page tables [rows, n]).

    Every byte is 0xFF, which is NaN in every dtype: what was not written must not matter.
    """
    per_row = -(-max_tokens // layout.page_tokens)
    arena = torch.full((rows * per_row * layout.page_bytes,), 0xFF, dtype=torch.uint8, device=device)
    tables = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(3)).to(
        device, torch.int32
    )
    return KVPages(layout, arena), tables.view(rows, per_row)


def batch_of(positions: list[range], page_tables: Tensor, page_tokens: int) -> PagedBatch:
    """The batch in which row r holds the tokens at `positions[r]`; `page_tables` [rows, pages] int32."""
    device = page_tables.device
    counts = torch.tensor([len(span) for span in positions])
    flat = torch.tensor(
        [position for span in positions for position in span], dtype=torch.int64, device=device
    )
    rows = torch.repeat_interleave(torch.arange(len(positions)), counts).to(device)
    pages = page_tables[rows, flat // page_tokens].long()
    starts = torch.zeros(len(positions) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    return PagedBatch(
        positions=flat,
        slots=pages * page_tokens + flat % page_tokens,
        query_starts=starts.to(device),
        page_tables=page_tables,
        max_context=1 + max((span[-1] for span in positions if len(span)), default=-1),
    )


def padded(batch: PagedBatch, page_tokens: int, size: int) -> PagedBatch:
    """The batch in the layout of a graph of `size` tokens, padded as whoever makes one for it does."""
    layout = padded_layout(size, batch.max_context, page_tokens)
    numbers = torch.zeros(layout.numbers, dtype=torch.int64, device=batch.positions.device)
    whole = layout.batch(numbers, size, size, batch.max_context)
    for places, own in ((whole.positions, batch.positions), (whole.slots, batch.slots)):
        places.fill_(-1)[: batch.tokens] = own
    starts = [*batch.query_starts.tolist(), *range(batch.tokens + 1, size + 1), *[size] * size]
    whole.query_starts.copy_(torch.tensor(starts[: size + 1]))
    whole.page_tables[: batch.rows, : batch.page_tables.shape[1]] = batch.page_tables
    return layout.batch(numbers, batch.tokens, batch.rows, batch.max_context)


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

    def batch(self, positions: list[range]) -> PagedBatch:
        return batch_of(positions, self.tables, self.pages.layout.page_tokens)

    def run(self, token_ids: Tensor, start: int) -> Tensor:
        """Hidden states behind the last block of one row's tokens at positions start, start + 1, …"""
        batch = self.batch([range(start, start + len(token_ids))])
        hidden = self.decoder.embed(token_ids, batch.positions)
        return self.decoder.run_blocks(hidden, batch, self.pages, 0, self.decoder.spec.blocks)


def kv_tensors(sequences: Sequences, block: int) -> list[Tensor]:
    """The tensors that hold one block's keys and values, page by page."""
    kv = sequences.pages.block(block)
    return [t for t in (kv.keys, kv.values, kv.key_params, kv.value_params) if t is not None]


def written(tensor: Tensor, slots: Tensor) -> Tensor:
    """What one of `kv_tensors` holds in the given slots."""
    page_tokens = tensor.shape[2]
    return tensor[slots // page_tokens, :, slots % page_tokens]


def assert_same_kv(got: Tensor, expected: Tensor, slots: Tensor, exact: bool) -> None:
    """Hold one of `kv_tensors` to another in the given slots: to the bit, or but for rounding."""
    got, expected = written(got, slots), written(expected, slots)
    if exact:
        assert torch.equal(got, expected)
    elif got.dtype == torch.uint8:  # a rounding the other way moves a code by one
        differing = (got ^ expected) != 0
        assert differing.float().mean() < 0.02
    else:
        torch.testing.assert_close(
            got, expected, atol=2e-3 if got.dtype == torch.float16 else 2e-5, rtol=1e-3
        )


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


def forced_logits(decoder: Decoder, prompt: Tensor, continuation: list[int], chunk: int) -> Tensor:
    """Logits [len(continuation), vocab] in front of each token of a given continuation, decoded token by token."""
    sequence = Sequences(decoder, max_tokens=len(prompt) + len(continuation))
    with torch.inference_mode():
        for start in range(0, len(prompt), chunk):
            hidden = sequence.run(prompt[start : start + chunk], start)
        logits = [decoder.head(hidden[-1:])]
        for step, token in enumerate(continuation[:-1]):
            logits.append(decoder.head(sequence.run(torch.tensor([token]), len(prompt) + step)))
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
