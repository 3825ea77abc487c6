"""`Decoder.run_pass` as its definition reads: each exit is asked, and who stops there is taken out of the batch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from exeunt.compression.decoder import Decoder
from exeunt.compression.device_pass import PassInputs, PassResults
from exeunt.compression.exits import ExitHead
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.model_pass import AtExit
from exeunt.kernels.paged_batch import PagedBatch


def pass_by_rows(
    heads: Sequence[ExitHead],
    decoder: Decoder,
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
    asked: PassInputs,
) -> PassResults:
    """What `Decoder.run_pass` returns; of the `heads` those that `asked` names are asked.

    What belongs to nobody is NaN.
    """
    blocks, depth, there = decoder._blocks, decoder.spec.blocks, hidden.device
    count, last = len(hidden), asked.last
    decoder.block_calls.count(0, depth, count)
    entries, gate_rows = (each[:count].tolist() for each in asked.layout.of_tokens(asked.numbers))
    *numbers, thresholds = asked.layout.of_logits(asked.numbers)
    wanted, asks, at_exits = (each.tolist() for each in numbers)
    row_of = torch.searchsorted(batch.query_starts.cpu(), torch.arange(count), right=True).sub(1).tolist()
    # what a graph is told beside: of each token the row of logits by which its row leaves, where tokens come in
    leaves_by = {row_of[wanted[n]]: n for n, bits in enumerate(asks) if bits}
    assert gate_rows == [leaves_by.get(row, asked.layout.logits) for row in row_of]
    assert {entry - 1 for entry in entries if entry} <= {each.index for each in asked.exits if each.takes_in}
    kinds = {at_exits[n] for n, bits in enumerate(asks) if bits}
    assert asked.propagates or AtExit.LEAVES not in kinds
    assert all(each.asked or not any(bits >> each.index & 1 for bits in asks) for each in asked.exits)
    left_at, gone, start = [last] * len(wanted), set[int](), 0
    logits = torch.full((len(wanted), decoder.spec.vocab_size), torch.nan, device=there)
    state = torch.full_like(hidden, torch.nan)

    def coming(place: int) -> list[int]:
        on_their_way = [t for t in range(count) if entries[t] <= place and row_of[t] not in gone]
        new = [t for t in on_their_way if entries[t] == place]
        state[new] = hidden[new]
        return on_their_way

    going = coming(0)
    for exit_ in asked.exits:
        if going:
            some = _some(batch, going, row_of)
            state[going] = blocks.run(state[going], some, pages, start, exit_.depth)
        start = exit_.depth
        asking = [
            n
            for n, bits in enumerate(asks)
            if bits >> exit_.index & 1 and left_at[n] == last and wanted[n] in going
        ]
        if asking:
            head = next(each for each in heads if each.depth == exit_.depth)
            own = state[[wanted[n] for n in asking]]
            gate = head.gate(own, thresholds[asking], exit_.project)
            leaving = [n for n, leaves in zip(asking, gate.leaves.tolist(), strict=True) if leaves]
            for n, of_exit in zip(leaving, gate.logits, strict=True):
                left_at[n], logits[n] = exit_.index, of_exit
            good = [wanted[n] for n in leaving if at_exits[n] == AtExit.LEAVES]
            if good:
                places = replace(
                    _some(batch, good, row_of), positions=batch.positions[good], slots=batch.slots[good]
                )
                blocks.project_kv(state[good], places, pages, start, depth)
            gone |= {row_of[wanted[n]] for n in leaving if at_exits[n] != AtExit.STAYS}
        going = coming(exit_.index + 1)
    if going:
        state[going] = blocks.run(state[going], _some(batch, going, row_of), pages, start, depth)
        ends = [n for n, token in enumerate(wanted) if token in going and left_at[n] == last]
        if ends:
            logits[ends] = decoder.head(state[[wanted[n] for n in ends]])
    return PassResults(logits, torch.tensor(left_at, device=there), state)


def _some(batch: PagedBatch, tokens: list[int], row_of: list[int]) -> PagedBatch:
    """The geometry of some tokens, ascending."""
    rows = [row_of[token] for token in tokens]
    there = sorted(set(rows))
    starts = np.cumsum([0, *(rows.count(row) for row in there)])
    return PagedBatch(
        batch.positions[tokens],
        batch.slots[tokens],
        torch.tensor(starts, dtype=torch.int32, device=batch.positions.device),
        batch.page_tables[there].contiguous(),
        batch.max_context,
    )
