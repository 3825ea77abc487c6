"""Texts through a decoder over pages of their own, a chunk at a time: what the engine does, without the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages, kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat
from exeunt.kernels.paged_batch import PagedBatch


class PagedRows:
    """Room for `rows` sequences of up to `longest` tokens; pages are dealt out in random order.

    The arena holds random finite numbers at first: time it as it stands, or write to it.
    """

    def __init__(self, decoder: Decoder, kv_cache: KVFormat, rows: int, longest: int) -> None:
        spec, device = decoder.spec, decoder.device
        layout = kv_layout(spec, kv_cache, decoder.dtype, page_bytes_for(spec, decoder.dtype))
        self.decoder, self.layout, self._device = decoder, layout, device
        each = -(-longest // layout.page_tokens)
        arena = torch.empty(
            rows * each * layout.page_bytes // 2, dtype=torch.bfloat16, device=device
        ).normal_()
        self.pages = KVPages(layout, arena.view(torch.uint8))
        self.tables = torch.randperm(rows * each, device=device).view(rows, each).to(torch.int32)

    def batch(self, rows: Sequence[int], positions: Sequence[Sequence[int]]) -> PagedBatch:
        """The geometry of these rows, each at its ascending positions."""
        tables = self.tables[torch.tensor(rows, device=self._device)]
        counts = torch.tensor([len(each) for each in positions], device=self._device)
        where = torch.tensor([p for each in positions for p in each], device=self._device)
        row_of = torch.repeat_interleave(torch.arange(len(rows), device=self._device), counts)
        size = self.layout.page_tokens
        pages = tables[row_of, where // size].to(torch.int64)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int32, device=self._device)
        starts[1:] = counts.cumsum(0)
        longest = max(each[-1] for each in positions) + 1
        used = -(-longest // size)
        return PagedBatch(where, pages * size + where % size, starts, tables[:, :used].contiguous(), longest)

    def logits(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        """Logits [tokens, vocab] behind token `ids` [tokens] int64, whose keys and values are written."""
        decoder = self.decoder
        hidden = decoder.embed(ids, batch.positions)
        return decoder.head(decoder.run_blocks(hidden, batch, self.pages, 0, decoder.spec.blocks))


def logits_of(
    decoder: Decoder, kv_cache: KVFormat, texts: Sequence[Sequence[int]], chunks: Sequence[int]
) -> list[Tensor]:
    """Logits [tokens, vocab] of each text, read side by side: first `chunks[0]` tokens of each, then `chunks[1]`, …

    The last chunk repeats until all texts are read.
    """
    rows = PagedRows(decoder, kv_cache, len(texts), max(map(len, texts)))
    found: list[list[Tensor]] = [[] for _ in texts]
    done, turn = 0, 0
    while done < max(map(len, texts)):
        size = chunks[min(turn, len(chunks) - 1)]
        spans = [range(done, min(done + size, len(text))) for text in texts]
        some = [row for row, span in enumerate(spans) if span]
        ids = torch.tensor([texts[row][p] for row in some for p in spans[row]], device=decoder.device)
        logits = rows.logits(ids, rows.batch(some, [spans[row] for row in some]))
        for row, part in zip(some, torch.split(logits, [len(spans[row]) for row in some]), strict=True):
            found[row].append(part)
        done, turn = done + size, turn + 1
    return [torch.cat(parts) for parts in found]


def backfilled_logits(
    decoder: Decoder, kv_cache: KVFormat, text: Sequence[int], stop: int, owed: int
) -> Tensor:
    """Logits [tokens, vocab] of a text of which every token passes blocks before `stop` alone, and waits there.

    When `owed` wait, the next one takes them through the others: these blocks write keys and values of tokens whose
    successors are in the blocks before them already. So an engine backfills.
    """
    rows, found, waiting = PagedRows(decoder, kv_cache, 1, len(text)), list[Tensor](), list[Tensor]()
    for at, token in enumerate(text):
        batch = rows.batch([0], [[at]])
        hidden = decoder.embed(torch.tensor([token], device=decoder.device), batch.positions)
        waiting.append(decoder.run_blocks(hidden, batch, rows.pages, 0, stop).clone())
        if len(waiting) > owed or at == len(text) - 1:
            late = rows.batch([0], [range(at + 1 - len(waiting), at + 1)])
            hidden = decoder.run_blocks(torch.cat(waiting), late, rows.pages, stop, decoder.spec.blocks)
            found.append(decoder.head(hidden))
            waiting.clear()
    return torch.cat(found)


def rewritten_logits(
    decoder: Decoder, kv_cache: KVFormat, text: Sequence[int], gaps: Sequence[int], beside: Sequence[int]
) -> Tensor:
    """Logits [tokens, vocab] of a text of which the tokens at the ascending positions `gaps` are read once more.

    When all of the text is there, others' keys and values are written over theirs, and then, in one call, with gaps
    between them and the last token of the text `beside` at their side, their own; then the text's last token anew.
    """
    device, last = decoder.device, len(text) - 1
    rows = PagedRows(decoder, kv_cache, 2, max(len(text), len(beside)))

    def read(tokens: Sequence[int], places: Sequence[Sequence[int]]) -> Tensor:
        batch = rows.batch(range(len(places)), places)
        return rows.logits(torch.tensor(list(tokens), device=device), batch)

    whole = read([*text, *beside], [range(len(text)), range(len(beside))])[: len(text)].clone()
    read([text[at - 1] for at in gaps], [gaps])
    anew = read([*(text[at] for at in gaps), beside[-1]], [gaps, [len(beside) - 1]])
    whole[list(gaps)] = anew[: len(gaps)]
    whole[last] = read([text[last]], [[last]])[0]
    return whole


def greedy(decoder: Decoder, kv_cache: KVFormat, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` most likely tokens behind a prompt, one after the other."""
    rows = PagedRows(decoder, kv_cache, 1, len(prompt) + count)
    ids, answer = torch.tensor(prompt, device=decoder.device), list[int]()
    positions = range(len(prompt))
    for _ in range(count):
        token = int(rows.logits(ids, rows.batch([0], [positions]))[-1].argmax())
        answer.append(token)
        ids, positions = ids.new_tensor([token]), range(positions.stop, positions.stop + 1)
    return answer
