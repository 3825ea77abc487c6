"""The tensors of audits: exits' logits that wait for the full model's, passes run for an audit alone, comparisons."""

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.paged_batch import PagedBatch
from exeunt.server.audit import Audit, is_audited
from exeunt.server.row import Row
from exeunt.server.sequence import Sequence
from exeunt.server.tick_batch import Part, TickBatch, geometry_of, integers, selected

log = logging.getLogger("exeunt.engine")


@dataclass(frozen=True, slots=True)
class _Comparison:
    """An early token's logits [vocab] at its exit and behind the last block."""

    row: Row
    position: int
    exit: Tensor
    full: Tensor


class TickAudits(NamedTuple):
    """What a tick's audits came to: what they found, and the blocks that were run for one of them alone."""

    found: list[tuple[Row, Audit]]
    blocks: list[tuple[Row, int]]


class Auditor:
    """Chooses which early tokens are audited and has the full model asked about them.

    Backfilled tokens wait, with their exit's logits, for the deep pass that they owe: a sequence has at most as many of
    them here as it owes positions. Where keys and values are propagated nothing is owed, and a pass is run at once.
    The full model is asked about audited tokens in calls of their own, so that no other token can differ by it.
    """

    def __init__(
        self, share: float, device: torch.device, captured_seconds: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`captured_seconds` says what the capturing of CUDA graphs has taken so far, which others account for."""
        self._share, self._device, self._captured_seconds = share, device, captured_seconds
        self._held: dict[Sequence, dict[int, Tensor]] = {}
        self._comparisons: list[_Comparison] = []
        self._blocks: list[tuple[Row, int]] = []
        self._seconds = 0.0

    @property
    def holds_nothing(self) -> bool:
        """Whether no logits are kept for a comparison to come."""
        return not self._held

    @property
    def enabled(self) -> bool:
        """Whether any early token is audited."""
        return self._share > 0.0

    def begin_tick(self) -> None:
        """A tick begins; if the one before was broken off, so are its comparisons."""
        self._comparisons, self._blocks, self._seconds = [], [], 0.0

    def take_seconds(self) -> float:
        """What audits have taken in this tick since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def forget(self, sequence: Sequence) -> None:
        """Drop what waits for a deep pass that will not come."""
        self._held.pop(sequence, None)

    def leave(
        self,
        leaving: Items[tuple[int, Row, int]],
        logits: Tensor,
        batch: TickBatch,
        decoder: Decoder,
        pages: KVPages,
        blocks: range,
    ) -> None:
        """Tokens leave at an exit: begin the audits of those that are chosen.

        Must come before their keys and values are propagated: a pass run for an audit leaves its own in their place.
        Where they have been, `left_in_one_call` does this.

        Args:
            leaving: (place in the batch, row, position) of each.
            logits: the exit's, [leaving, vocab].
            batch: the batch at the exit.
            decoder: of the batch's variant.
            pages: of the batch's variant.
            blocks: the blocks that they skip.
        """
        with self._aside():
            deeper = self._hold_or_pick(leaving, logits)
            if deeper:
                parts = [Part(row, [position]) for _, row, position in (leaving[n] for n in deeper)]
                states = selected(batch.hidden, [leaving[n][0] for n in deeper])
                geometry = geometry_of(parts, self._device)
                self._look_deeper(parts, selected(logits, deeper), states, geometry, decoder, pages, blocks)

    def left_in_one_call(
        self,
        leaving: Items[tuple[int, Row, int]],
        logits: Tensor,
        states: Tensor,
        decoder: Decoder,
        pages: KVPages,
        depth: int,
    ) -> None:
        """`leave` where the whole pass is over: keys and values are propagated, and are so again behind an audit.

        Args:
            leaving: (place, row, position) of each.
            logits: the exit's, [leaving, vocab].
            states: [tokens, hidden] by place, of those that are gone at the exit.
            decoder: of the tick's variant.
            pages: of the tick's variant.
            depth: the blocks in front of the exit.
        """
        deeper: list[int] = []
        with self._aside():
            deeper = self._hold_or_pick(leaving, logits)
        if not deeper:
            return
        began = self._clock()
        parts = [Part(row, [position]) for _, row, position in (leaving[n] for n in deeper)]
        own = selected(states, [leaving[n][0] for n in deeper])
        geometry, blocks = geometry_of(parts, self._device), range(depth, decoder.spec.blocks)
        self._seconds += self._clock() - began
        with self._aside():
            self._look_deeper(parts, selected(logits, deeper), own, geometry, decoder, pages, blocks)
        began = self._clock()
        # not given up with an audit: without it these tokens would have other keys and values than were certified
        decoder.project_kv(own, geometry, pages, blocks.start, blocks.stop)
        self._seconds += self._clock() - began

    def _hold_or_pick(self, leaving: Items[tuple[int, Row, int]], logits: Tensor) -> list[int]:
        """Of tokens that leave and are audited, keep the logits [leaving, vocab] of those that owe a deep pass.

        Returns which of the others are audited: a pass is to be run for each.
        """
        if self._share <= 0.0:
            return []
        deeper = []
        for n, (_, row, position) in enumerate(leaving):
            if not self._chooses(row.sequence, position):
                continue
            if row.sequence.replays_exits:
                deeper.append(n)
            else:
                self._held.setdefault(row.sequence, {})[position] = logits[n].clone()
        return deeper

    def _look_deeper(
        self,
        parts: Items[Part],
        exits: Tensor,
        states: Tensor,
        geometry: PagedBatch,
        decoder: Decoder,
        pages: KVPages,
        blocks: range,
    ) -> None:
        """Run the blocks that tokens skip, for their audits alone; `exits` [parts, vocab] are their logits."""
        self._blocks += [(part.row, len(blocks)) for part in parts]
        full = decoder.head(decoder.run_blocks(states, geometry, pages, blocks.start, blocks.stop))
        for part, exit_logits, full_logits in zip(parts, exits, full, strict=True):
            self._comparisons.append(_Comparison(part.row, part.positions[0], exit_logits, full_logits))

    def arrive(self, tokens: Items[tuple[int, Row, int]], states: Tensor, decoder: Decoder) -> None:
        """Tokens have passed all blocks: ask the model's own head about those that wait for it.

        Of each `tokens` give place, row and position, and `states` [any, hidden] the state at its place.
        """
        if not self._held:
            return
        with self._aside():
            places, waited = [], []
            for place, row, position in tokens:
                held = self._held.get(row.sequence)
                if held is not None and position in held:
                    places.append(place)
                    waited.append((row, position, held.pop(position)))
                    if not held:
                        del self._held[row.sequence]
            if places:
                full = decoder.head(selected(states, places))
                self._comparisons += [
                    _Comparison(row, position, logits, row_logits)
                    for (row, position, logits), row_logits in zip(waited, full, strict=True)
                ]

    def end_tick(self, emitted: Callable[[Row, int], int | None]) -> TickAudits:
        """The tick's outcome. `emitted` says which token followed from a position, None where drawing it failed."""
        if not self._comparisons:
            return TickAudits([], self._blocks)
        found: list[tuple[Row, Audit]] = []
        with self._aside():
            drawn = [(each, emitted(each.row, each.position)) for each in self._comparisons]
            compared = [(each, token) for each, token in drawn if token is not None]
            if compared:
                found = _compare([each for each, _ in compared], [token for _, token in compared])
        return TickAudits(found, self._blocks)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work that is timed apart, and whose failure costs audits and no answer."""
        began = self._clock()
        try:
            yield
        except Exception as error:
            log.error("a tick's audits are given up", exc_info=error)
            self._comparisons = []
        finally:
            self._seconds += self._clock() - began

    def _clock(self) -> float:
        return time.perf_counter() - self._captured_seconds()

    def _chooses(self, sequence: Sequence, position: int) -> bool:
        """Drafts of the verified mode are all compared anyway, and a scored text is nobody's answer."""
        wanted = sequence.exits.mode == "approximate" and not sequence.scoring
        return wanted and is_audited(sequence.name, position, self._share)


def _compare(comparisons: Items[_Comparison], tokens: Items[int]) -> list[tuple[Row, Audit]]:
    """What the comparisons say; `tokens` are those that were emitted."""
    exits = torch.stack([each.exit for each in comparisons]).float()
    fulls = torch.stack([each.full for each in comparisons]).float()
    log_exit, log_full = exits.log_softmax(-1), fulls.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_exit, log_full, reduction="none", log_target=True).sum(-1)
    at = integers(list(tokens), exits.device)[:, None]
    agreed = exits.argmax(-1) == fulls.argmax(-1)
    figures = torch.stack([kl, -log_full.gather(1, at)[:, 0], -log_exit.gather(1, at)[:, 0]], dim=1)
    return [
        (each.row, Audit(each.position, same, *values))
        for each, same, fine, values in zip(
            comparisons, agreed.tolist(), figures.isfinite().all(1).tolist(), figures.tolist(), strict=True
        )
        if fine  # else the sequence is broken, and fails at its next token of full depth
    ]
