"""What exits cost on the machine at hand, in units of one block: measured, because sizes of matrices mislead.

A block's time is its weights and its attention, an INT4 projection costs a quarter of a full one, and few rows cost
nearly what one costs: none of it can be read off a parameter count. Each part is timed on a decode batch, in turn with
the others so that a drifting machine moves them alike. Of its times the shortest counts, for whatever else the machine
does only adds to them, and only ratios leave this file.
"""

import time
from collections.abc import Callable
from typing import Final

import torch

from exeunt.calibration.exit_choice import ExitCosts
from exeunt.calibration.sequence_batch import batches
from exeunt.calibration.teacher_forcing import ForcedModel

ROWS: Final = 8
"""Sequences of the decode batch."""
CONTEXT: Final = 256
"""Tokens that each has behind it, or as many as the model takes."""
ROUNDS: Final = 15


@torch.inference_mode()
def measure_exit_costs(model: ForcedModel) -> ExitCosts:
    """The time of gate, projection and skipped keys and values over that of a block of `model`."""
    decoder, head, device = model.decoder, model.exits[-1], model.decoder.device
    context = min(CONTEXT, decoder.spec.max_position_embeddings)
    rows = [torch.zeros(context, dtype=torch.int64)] * ROWS
    batch = next(batches(rows, ROWS * context, device))
    last = (batch.positions == context - 1).nonzero().squeeze(1)
    geometry, pages = batch.geometry(model.layout.page_tokens, last), model.pages(batch)
    hidden = decoder.embed(batch.token_ids[last], geometry.positions)
    (state, probe), blocks = head.read(hidden), model.blocks
    nobody = torch.full((ROWS,), torch.inf, device=device)
    parts: dict[str, Callable[[], object]] = {
        "blocks": lambda: decoder.run_blocks(hidden, geometry, pages, 0, blocks),
        "gate": lambda: head.gate(hidden, nobody, decoder.project_exit),
        "projection": lambda: head.confidence(probe, decoder.project_exit(state)),
        "skipped_kv": lambda: decoder.project_kv(hidden, geometry, pages, 0, blocks),
    }
    seconds = _in_turn(parts, device)
    block = seconds["blocks"] / blocks
    return ExitCosts(
        seconds["gate"] / block, seconds["projection"] / block, seconds["skipped_kv"] / blocks / block
    )


def _in_turn(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
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
