"""`Decoder.decide` as its definition reads: who leaves is asked at each exit, and taken out of the batch."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exeunt.compression.decided_pass import AskedExit, DecidedPass
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead
from exeunt.compression.kv_format import KVPages
from exeunt.kernels.paged_batch import PagedBatch


def decide_by_rows(
    heads: Sequence[ExitHead],
    decoder: Decoder,
    hidden: Tensor,
    batch: PagedBatch,
    pages: KVPages,
    thresholds: Tensor,
    exits: Sequence[AskedExit],
) -> DecidedPass:
    """What `Decoder.decide` returns; of the `heads` those that `exits` name are asked."""
    blocks, last, rows = decoder._blocks, decoder.spec.blocks, len(hidden)
    decoder.block_calls.count(0, last, rows)
    shape, there = (rows, hidden.shape[1]), hidden.device
    left_at = torch.full((rows,), len(exits), dtype=torch.int32, device=there)
    logits = torch.full((rows, decoder.spec.vocab_size), torch.nan, device=there)
    states, here, start = [], torch.arange(rows, device=there), 0
    for place, asked in enumerate(exits):
        state = torch.full(shape, torch.nan, device=there, dtype=hidden.dtype)
        if len(here):
            hidden = blocks.run(hidden.clone(), batch.take(here), pages, start, asked.depth)
            state[here] = hidden
            head = next(each for each in heads if each.depth == asked.depth)
            gate = head.gate(hidden, thresholds.to(there)[here], asked.project)
            leaves = gate.leaves.to(there)
            gone = here[leaves]
            if len(gone):
                left_at[gone], logits[gone] = place, gate.logits
                places = replace(batch.take(gone), slots=batch.slots[gone])
                blocks.project_kv(hidden[leaves], places, pages, asked.depth, last)
            here, hidden = here[~leaves], hidden[~leaves]
        states.append(state)
        start = asked.depth
    if len(here):
        logits[here] = decoder.head(blocks.run(hidden.clone(), batch.take(here), pages, start, last))
    return DecidedPass(logits, left_at, torch.stack(states))
