"""A given text through a model whose tokens may leave early, all tokens at once, stage by stage.

This pass defines the risk that certificates speak of: every token of a row but the first is asked at every exit
whether it leaves. The first token of a row stands for the prompt, which never leaves. Where skipped keys and values are
propagated, a token that leaves has its deeper keys and values projected from its state there, and every later token
attends to what was left behind. Where they are backfilled, the deeper blocks see every token's own state in the end, so
all states are those of full depth, and one pass without exits serves every threshold. The result is that of running the
tokens one by one: a block's keys and values of position p come from position p's own state, and a token attends to
earlier positions of its row only, so all tokens may pass a stage together.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from exeunt.calibration.page_arena import PageArena
from exeunt.calibration.sequence_batch import SequenceBatch
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.kv_format import KVLayout, KVPages, kv_layout, page_bytes_for
from exeunt.compression.variant import KVFormat

Sink = Callable[[int, Tensor, Tensor], None]
"""Called with an exit's number (the number of exits for the final head), which tokens [K] int64 leave there, ascending,
and their logits [K, V] float32."""

LOGITS_AT_ONCE = 1 << 25
"""Elements of a logits tensor that the final head makes at once: 128 MiB in float32."""


class ForcedModel:
    """One variant of a model with its exits, for teacher-forced passes, which keep their pages in one arena."""

    def __init__(
        self, decoder: Decoder, kv_cache: KVFormat, exits: Sequence[ExitHead], arena: PageArena | None = None
    ) -> None:
        """`exits` shallowest first; they are moved to the decoder's device and dtype.

        `arena` may be other models' too; a pass of one ends before another's begins.
        """
        spec, block = decoder.spec, decoder.linear_block
        page_bytes = page_bytes_for(spec, decoder.dtype)
        self.decoder = decoder
        self.exits = tuple(head.to(decoder.device, decoder.dtype) for head in exits)
        self.layout: KVLayout = kv_layout(
            spec, kv_cache, decoder.dtype, page_bytes, block.index if block else None
        )
        self._arena = arena or PageArena()

    @property
    def blocks(self) -> int:
        """Blocks of the model, one that the linear block replaces among them."""
        return self.decoder.spec.blocks

    def depth(self, exit_number: int) -> int:
        """Blocks passed by a token that leaves at an exit, counted from 0; the last number is the final head."""
        return self.exits[exit_number].depth if exit_number < len(self.exits) else self.blocks

    def pages(self, batch: SequenceBatch) -> KVPages:
        """Pages for all of `batch`'s rows; the same arena whenever it is large enough."""
        count = batch.pages(self.layout.page_tokens)
        return self._arena.pages(self.layout, count, self.decoder.device)

    @torch.inference_mode()
    def full_depth_at_exits(self, batch: SequenceBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """The states [T, H] behind each exit's block, and behind the last block, where no token leaves."""
        pages, geometry = self.pages(batch), batch.geometry(self.layout.page_tokens)
        hidden = self.decoder.embed(batch.token_ids, batch.positions)
        states, start = [], 0
        for number in range(len(self.exits) + 1):
            hidden = self.decoder.run_blocks(hidden, geometry, pages, start, self.depth(number))
            start = self.depth(number)
            states.append(hidden)
        return tuple(states[:-1]), states[-1]

    def full_depth(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """The states [T, H] behind the first exit's block (or the last, without exits) and behind the last block."""
        states, final = self.full_depth_at_exits(batch)
        return (states[0] if states else final), final

    @torch.inference_mode()
    def top_tokens(self, final: Tensor) -> Tensor:
        """The final head's most likely token for states [T, H] behind the last block: [T] int64."""
        return torch.cat([logits.argmax(-1) for _, logits in self._final_logits(final)])

    @torch.inference_mode()
    def final(self, hidden: Tensor, tokens: Tensor, sink: Sink) -> None:
        """Give the final head's logits of `hidden` [K, H], the states of `tokens` [K], to `sink`, piece by piece."""
        for part, logits in self._final_logits(hidden):
            sink(len(self.exits), tokens[part], logits)

    @torch.inference_mode()
    def with_exits(
        self, batch: SequenceBatch, threshold: float, entry: Tensor, sink: Sink, *, to_the_end: bool = True
    ) -> None:
        """Run `batch` with exits at `threshold`, and give every token's logits to `sink` where it leaves.

        `entry` [T, H] is the state behind the first exit's block, which exits do not change (see `full_depth`).
        Without `to_the_end` the pass stops at the last exit, and tokens that do not leave are not given to `sink`.
        """
        pages, page_tokens = self.pages(batch), self.layout.page_tokens
        kept = torch.arange(batch.tokens, device=entry.device)
        hidden = entry
        for number, head in enumerate(self.exits):
            leaves = self._leave(number, hidden, kept, batch, threshold, sink)
            if bool(leaves.any()):
                gone = batch.geometry(page_tokens, kept[leaves])
                self.decoder.project_kv(hidden[leaves], gone, pages, head.depth, self.blocks)
                kept, hidden = kept[~leaves], hidden[~leaves]
            last = number + 1 == len(self.exits)
            if len(kept) == 0 or (last and not to_the_end):
                return
            geometry = batch.geometry(page_tokens, kept)
            hidden = self.decoder.run_blocks(hidden, geometry, pages, head.depth, self.depth(number + 1))
        self.final(hidden, kept, sink)

    @torch.inference_mode()
    def with_backfill(
        self, batch: SequenceBatch, threshold: float, states: Sequence[Tensor], final: Tensor, sink: Sink
    ) -> None:
        """Give every token's logits to `sink` where it leaves at `threshold`, skipped keys and values being backfilled.

        `states` and `final` are those of `full_depth_at_exits`: with backfill a token that leaves changes no later one.
        """
        kept = torch.arange(batch.tokens, device=final.device)
        for number, hidden in enumerate(states):
            kept = kept[~self._leave(number, hidden[kept], kept, batch, threshold, sink)]
        self.final(final[kept], kept, sink)

    def _leave(
        self, number: int, hidden: Tensor, kept: Tensor, batch: SequenceBatch, threshold: float, sink: Sink
    ) -> Tensor:
        """Ask an exit's gate about tokens `kept` [K] with states [K, H]; who leaves, [K] bool, is given to `sink`."""
        thresholds = torch.full((len(kept),), threshold, dtype=torch.float32, device=hidden.device)
        thresholds[batch.positions[kept] == 0] = torch.inf
        gate = self.exits[number].gate(hidden, thresholds, self.decoder.project_exit)
        if bool(gate.leaves.any()):
            sink(number, kept[gate.leaves], gate.logits[gate.leaves[gate.projected]])
        return gate.leaves

    def _final_logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        rows = max(1, LOGITS_AT_ONCE // self.decoder.spec.vocab_size)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            yield part, self.decoder.head(hidden[part])
