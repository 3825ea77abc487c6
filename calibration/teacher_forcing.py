"""A given text through a model whose tokens may leave early, all tokens at once, stage by stage.

This pass defines the risk that certificates speak of: every token of a row but the first is asked at every exit
whether it leaves. The first token of a row stands for the prompt, which never leaves. Where skipped keys and values are
propagated, a token that leaves has its deeper keys and values projected from its state there, and every later token
attends to what was left behind. Where they are backfilled, the deeper blocks see every token's own state in the end, so
all states are those of full depth, and one pass without exits serves every threshold. The result is that of running the
tokens one by one: a block's keys and values of position p come from position p's own state, and a token attends to
earlier positions of its row only, so all tokens may pass a stage together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

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

AskedSink = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with an exit's number, which tokens [K] int64 its gate was asked about, ascending, which of these [K] bool it
looked at, and which of those [K] bool it projected onto the whole vocabulary."""

LOGITS_AT_ONCE = 1 << 25
"""Elements of a logits tensor that are made at once where memory alone limits it: 128 MiB in float32."""
_LOGITS_IN_CACHE = 1 << 18  # 1 MiB in float32: what is read off them then costs a tenth
LEAST_LOGIT_ROWS = 64  # fewer would read the output matrix too often


def logit_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits [rows, vocab] to make at once: what a CPU's cache holds, or a small part of a GPU's memory."""
    most = _LOGITS_IN_CACHE if device.type == "cpu" else LOGITS_AT_ONCE
    return max(LEAST_LOGIT_ROWS, most // vocab_size)


def _unheard(_exit: int, _tokens: Tensor, _looked: Tensor, _whole: Tensor) -> None:
    """Where nobody counts what gates are asked."""


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
        states = self.states_at(batch, [self.depth(number) for number in range(len(self.exits) + 1)])
        return tuple(states[:-1]), states[-1]

    @torch.inference_mode()
    def states_at(
        self, batch: SequenceBatch, depths: Sequence[int], start: int = 0, entry: Tensor | None = None
    ) -> list[Tensor]:
        """The states [T, H] behind the first `depths` (ascending) blocks, where no token leaves.

        They go on from `entry` [T, H], the state in front of block `start`, where that is known.
        """
        pages, geometry = self.pages(batch), batch.geometry(self.layout.page_tokens)
        hidden = self.decoder.embed(batch.token_ids, batch.positions) if entry is None else entry
        states = []
        for depth in depths:
            hidden = self.decoder.run_blocks(hidden, geometry, pages, start, depth)
            start = depth
            states.append(hidden)
        return states

    @torch.inference_mode()
    def states_by_depth(
        self, batch: SequenceBatch, also: int | None = None, base: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """The states [T, H] behind each exit's block, the last block, and `also` behind the first so many blocks.

        No token leaves. `base` are those of the same variant without its linear block: up to that block they are the
        same, and where it has the state in front of it the pass begins there.
        """
        wanted = sorted(
            {*(head.depth for head in self.exits), self.blocks, *(() if also is None else (also,))}
        )
        block = self.decoder.linear_block
        if base is None or block is None or block.index not in base:
            return dict(zip(wanted, self.states_at(batch, wanted), strict=True))
        known = {depth: base[depth] for depth in wanted if depth <= block.index}
        deeper = [depth for depth in wanted if depth > block.index]
        states = self.states_at(batch, deeper, block.index, base[block.index])
        return known | dict(zip(deeper, states, strict=True))

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
        self,
        batch: SequenceBatch,
        threshold: float,
        entry: Tensor,
        sink: Sink,
        *,
        to_the_end: bool = True,
        first: Tensor | None = None,
        asked: AskedSink = _unheard,
        wanted: Tensor | None = None,
    ) -> None:
        """Run `batch` with exits at `threshold`, and give every token's logits to `sink` where it leaves.

        `entry` [T, H] is the state behind the first exit's block, which exits do not change (see `full_depth`).
        Without `to_the_end` the pass stops at the last exit, and tokens that do not leave are not given to `sink`.
        `first` [T] bool says who leaves at the first exit, where that is known: its gate is not asked then, and neither
        `sink` nor `asked` is told of it. Of tokens that stay only those `wanted` [T] bool are given to `sink`.
        """
        pages, page_tokens = self.pages(batch), self.layout.page_tokens
        kept = torch.arange(batch.tokens, device=entry.device)
        hidden = entry
        for number, head in enumerate(self.exits):
            known = first if number == 0 else None
            leaves = (
                self._leave(number, hidden, kept, batch, threshold, sink, asked) if known is None else known
            )
            if bool(leaves.any()):
                gone = batch.geometry(page_tokens, kept[leaves])
                self.decoder.project_kv(hidden[leaves], gone, pages, head.depth, self.blocks)
                kept, hidden = kept[~leaves], hidden[~leaves]
            last = number + 1 == len(self.exits)
            if len(kept) == 0 or (last and not to_the_end):
                return
            geometry = batch.geometry(page_tokens, kept)
            hidden = self.decoder.run_blocks(hidden, geometry, pages, head.depth, self.depth(number + 1))
        if wanted is not None:
            hidden, kept = hidden[wanted[kept]], kept[wanted[kept]]
        self.final(hidden, kept, sink)

    def _leave(
        self,
        number: int,
        hidden: Tensor,
        kept: Tensor,
        batch: SequenceBatch,
        threshold: float,
        sink: Sink,
        asked: AskedSink = _unheard,
    ) -> Tensor:
        """Ask an exit's gate about tokens `kept` [K] with states [K, H]; who leaves, [K] bool, is given to `sink`."""
        thresholds = torch.full((len(kept),), threshold, dtype=torch.float32, device=hidden.device)
        thresholds[batch.positions[kept] == 0] = torch.inf
        leaves = torch.zeros(len(kept), dtype=torch.bool, device=hidden.device)
        for part in self._parts(len(kept)):
            gate = self.exits[number].gate(hidden[part], thresholds[part], self.decoder.project_exit)
            leaves[part] = gate.leaves
            looked, whole = (torch.zeros(len(gate.leaves), dtype=torch.bool) for _ in range(2))
            looked[gate.looked], whole[gate.whole] = True, True
            asked(number, kept[part], looked.to(hidden.device), whole.to(hidden.device))
            if bool(gate.leaves.any()):
                sink(number, kept[part][gate.leaves], gate.logits)
        return leaves

    def _final_logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part in self._parts(len(hidden)):
            yield part, self.decoder.head(hidden[part])

    def _parts(self, tokens: int) -> Iterator[slice]:
        """`tokens` tokens in runs whose logits are made at once."""
        rows = logit_rows(self.decoder.spec.vocab_size, self.decoder.device)
        return (slice(start, start + rows) for start in range(0, tokens, rows))
