"""A pass over whole rows whose attention reads altered keys and values: every form of them at once, block by block.

The blocks are the decoder's own; only the pages are left out: a row's keys and values go through a form and are read
from there. Blocks are walked outermost and each is asked for once, so that a decoder that streams its blocks reads
each of them once for all forms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from exeunt.calibration.kv_forms import FULL, KVForm
from exeunt.calibration.sequence_batch import SequenceBatch
from exeunt.compression.block import Block, Rotation
from exeunt.compression.decoder import Decoder
from exeunt.compression.linear_block import LinearBlock

KVPart = Literal["keys", "values", "both"]
Advance = Callable[[int], None]
Look = Callable[[Tensor, Tensor], None]
"""Called with one row's keys and values [tokens, kv_heads, head_dim] as a block makes them."""


@dataclass(frozen=True, slots=True)
class KVReading:
    """What attention reads: keys, values or both in a form, the rest in full."""

    form: KVForm
    part: KVPart

    def keys(self, keys: Tensor) -> Tensor:
        """What is read for a row's keys [tokens, kv_heads, head_dim], float32."""
        return (FULL if self.part == "values" else self.form).keys(keys)

    def values(self, values: Tensor) -> Tensor:
        """What is read for a row's values [tokens, kv_heads, head_dim], float32."""
        return (FULL if self.part == "keys" else self.form).values(values)

    def token_bytes(self, heads: int, head_dim: int, itemsize: int, row_tokens: int) -> float:
        """Bytes of one token's keys and values in `heads` heads in all; see `KVForm.head_bytes`."""
        key_form = FULL if self.part == "values" else self.form
        value_form = FULL if self.part == "keys" else self.form
        each = (form.head_bytes(head_dim, itemsize, row_tokens) for form in (key_form, value_form))
        return heads * sum(each)


FULL_READING = KVReading(FULL, "both")


@torch.inference_mode()
def states_behind(
    decoder: Decoder,
    groups: Sequence[SequenceBatch],
    readings: Sequence[KVReading],
    *,
    look: Look | None = None,
    advance: Advance = lambda _tokens: None,
) -> list[list[Tensor]]:
    """The states [T, H] behind the last block for each of `readings`, and in it for each of `groups`.

    `look` sees the keys and values of the first reading's pass, before its form alters them. `advance` is told a
    group's tokens once for every block and reading.
    """
    states = [[decoder.embed(group.token_ids, group.positions) for group in groups] for _ in readings]
    for index in range(decoder.spec.blocks):
        block = decoder.block(index)
        for number, group in enumerate(groups):
            rotation = decoder.rotation(group.positions, group.longest)
            for order, reading in enumerate(readings):
                seen = look if order == 0 else None
                states[order][number] = _through(block, states[order][number], rotation, group, reading, seen)
                advance(group.tokens)
        del block  # before a streamed decoder reads the next one
    return states


def _through(
    block: Block | LinearBlock,
    hidden: Tensor,
    rotation: Rotation,
    group: SequenceBatch,
    reading: KVReading,
    look: Look | None,
) -> Tensor:
    """The state behind one block; `hidden` may be overwritten."""
    if isinstance(block, LinearBlock):
        return block.apply(hidden)
    queries, keys, values = block.attention_inputs(hidden, rotation)
    attended = torch.empty_like(queries)
    for row in row_slices(group):
        if look is not None:
            look(keys[row], values[row])
        attended[row] = attend(
            queries[row], reading.keys(keys[row]), reading.values(values[row]), block.scale, block.window
        )
    return block.add_attended(hidden, attended)


def row_slices(group: SequenceBatch) -> list[slice]:
    """Where each row of a batch stands among its tokens."""
    ends = torch.bincount(group.rows).cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """One row's causal attention, [tokens, heads, head_dim] in the queries' dtype, computed in float32.

    `queries` are [tokens, heads, head_dim], `keys` and `values` [tokens, kv_heads, head_dim] float32; each token
    attends to itself and what is before it, of which only the last `window` tokens where there is a window.
    """
    tokens = queries.shape[0]
    windowed = window is not None and window < tokens
    by_head = [x.transpose(0, 1)[None] for x in (queries.float(), keys, values)]
    attended = F.scaled_dot_product_attention(
        by_head[0],
        by_head[1],
        by_head[2],
        attn_mask=_band(tokens, window, queries.device) if window is not None and windowed else None,
        is_causal=not windowed,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).to(queries.dtype)


def _band(tokens: int, window: int, device: torch.device) -> Tensor:
    """[tokens, tokens] bool: who attends to whom where only the last `window` tokens are seen."""
    places = torch.arange(tokens, device=device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)
