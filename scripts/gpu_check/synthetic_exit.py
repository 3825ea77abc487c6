"""An exit for models with random weights, whose gate lets a wanted share of the tokens leave.

The exit passes the state on as it is, and its gate reads a random direction of it: what leaves says nothing, how many
do says what exits cost and gain. The gate's constant is set by states of the model itself, those of texts that it goes
on writing; the share of an engine's tokens that left stands beside, since answers with exits are other texts.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.decoder import Decoder
from exeunt.compression.exits import ExitHead, ExitProbe
from exeunt.compression.norm import Norm
from exeunt.compression.variant import KVFormat
from exeunt.kernels.exit_gate import exit_state
from scripts.gpu_check.paged_rows import PagedRows
from scripts.gpu_check.prompts import packaged_prompts
from scripts.gpu_check.report import Context

WANTED = 0.5
"""Share of the tokens that are to leave."""
_TEXTS, _PROMPT, _ANSWER = 16, 64, 24
_UNITS = 64  # of the probe


def synthetic_exit(spec: Architecture, device: torch.device) -> ExitHead:
    """The exit half-way, in bfloat16, its gate's constant 0: at a threshold of 0.5 some share of the tokens leaves."""
    hidden, drawn = spec.hidden_size, torch.Generator().manual_seed(3)
    probe = ExitProbe(
        torch.randn(_UNITS, hidden, generator=drawn) / hidden**0.5,
        torch.zeros(_UNITS),
        torch.randn(_UNITS, generator=drawn),
        torch.zeros(()),
    )
    norm = Norm(spec.norm, torch.ones(hidden), None, spec.norm_eps)
    combine = torch.tensor([1.0, 0.0, 0.0, 0.0])
    head = ExitHead(spec.blocks // 2 - 1, norm, torch.zeros(hidden, hidden), probe, combine, 0.0)
    return head.to(device, torch.bfloat16)


def rated_prompts(context: Context) -> list[list[int]]:
    """The prompts behind which a model's own tokens set the share that leaves."""
    return packaged_prompts(2, 16) if context.quick else packaged_prompts(_TEXTS, _PROMPT)


@torch.inference_mode()
def with_rate(
    head: ExitHead, decoder: Decoder, kv_cache: KVFormat, prompts: Sequence[Sequence[int]], rate: float
) -> ExitHead:
    """The exit with the constant at which, at a threshold of 0.5, a share `rate` of the model's own tokens leaves.

    The tokens are those that the decoder goes on with behind `prompts`, of which it reads some.
    """
    texts = [prompt[:_PROMPT] for prompt in prompts[:_TEXTS]]
    logits = torch.cat(
        [exit_state(states, head.weights)[1] for states in _states(decoder, kv_cache, texts, head.block)]
    )
    bias = head.probe.output_bias - logits.quantile(1 - rate)
    return replace(head, probe=replace(head.probe, output_bias=bias))


def _states(decoder: Decoder, kv_cache: KVFormat, texts: Sequence[Sequence[int]], block: int) -> list[Tensor]:
    """The states behind a block [texts, hidden] of each token of the greedy answers."""
    rows = PagedRows(decoder, kv_cache, len(texts), max(map(len, texts)) + _ANSWER)
    positions = [range(len(text)) for text in texts]
    ids = torch.tensor([token for text in texts for token in text], device=decoder.device)
    found: list[Tensor] = []
    for _ in range(_ANSWER):
        batch = rows.batch(range(len(texts)), positions)
        hidden = decoder.run_blocks(decoder.embed(ids, batch.positions), batch, rows.pages, 0, block + 1)
        last = batch.query_starts[1:].long() - 1
        found.append(hidden[last].clone())
        hidden = decoder.run_blocks(hidden, batch, rows.pages, block + 1, decoder.spec.blocks)
        ids = decoder.head(hidden[last]).argmax(-1)
        positions = [range(each.stop, each.stop + 1) for each in positions]
    return found
