"""Keys and values of many blocks from one state, as one matrix: what an early token owes the deeper blocks.

For where the native kernels do not run: those read each block's own weights in one call, and need no copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exeunt.compression.block import Block
from exeunt.compression.linear import FullLinear
from exeunt.compression.norm import rms_norm
from exeunt.kernels.full_linear import full_linear


class KVProjection:
    """The K and V rows of consecutive full-precision blocks in one stack, with each block's norm weights folded in.

    All skipped blocks see the same state, so they share its normalisation x̂ and differ in the norm's weight g and
    bias c only: W (g ⊙ x̂ + c) + b = (W diag(g)) x̂ + (W c + b). One matrix product replaces a norm and a product per
    block. The stack is a copy of those rows: 2·kv_size·hidden weights a block, 3.7 % of Mistral-7B's weights, 11 % of
    GPT-2's. It is built when the first token is projected, from the first block that was skipped; a later start uses
    a slice of it, an earlier start rebuilds it. Folding rounds W diag(g) once to the model's dtype.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._first = len(blocks)  # of the stack
        self._weight: Tensor | None = None  # [(blocks - first) * 2 * kv_size, hidden]
        self._bias: Tensor | None = None
        self._key_norms: Tensor | None = None  # [blocks - first, kv_heads, head_dim] (Qwen3)

    def applies(self, start: int, stop: int) -> bool:
        """Whether blocks `start` to `stop` - 1 are all in full precision; INT4 rows cannot take a folded norm."""
        return all(isinstance(block.qkv, FullLinear) for block in self._blocks[start:stop])

    def __call__(self, hidden: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys (not yet rotated) and values of blocks `start` to `stop` - 1, each [tokens, blocks, kv_heads, head_dim].

        `hidden` [tokens, hidden] is the state that every one of the blocks is given.
        """
        weight, bias = self._stack(start)
        spec = self._blocks[0].spec
        normalised = self._blocks[start].attention_norm.normalise(hidden)
        width = 2 * spec.kv_size
        rows = slice((start - self._first) * width, (stop - self._first) * width)
        stacked = full_linear(normalised, weight[rows], bias[rows] if bias is not None else None)
        heads = stacked.view(hidden.shape[0], stop - start, 2, spec.kv_heads, spec.head_dim)
        keys = heads[:, :, 0]
        if self._key_norms is not None:
            keys = rms_norm(keys, self._key_norms[start - self._first : stop - self._first], spec.norm_eps)
        return keys, heads[:, :, 1]

    @property
    def nbytes(self) -> int:
        """Bytes of the stack as it stands: 0 until the first token is projected."""
        return sum(tensor.nbytes for tensor in (self._weight, self._bias) if tensor is not None)

    def _stack(self, start: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the stack, rebuilt where it begins behind block `start`."""
        if self._weight is None or start < self._first:
            with torch.inference_mode(False):
                folded = [_folded(block) for block in self._blocks[start:]]
                self._weight = torch.cat([weight for weight, _ in folded])
                if any(bias is not None for _, bias in folded):
                    zeros = [weight.new_zeros(weight.shape[0]) for weight, _ in folded]
                    biases = [
                        zero if bias is None else bias for zero, (_, bias) in zip(zeros, folded, strict=True)
                    ]
                    self._bias = torch.cat(biases)
                heads = self._blocks[0].spec.heads
                norms = [
                    block.head_norm[heads:] for block in self._blocks[start:] if block.head_norm is not None
                ]
                self._key_norms = torch.stack(norms) if norms else None
                self._first = start
        return self._weight, self._bias


def _folded(block: Block) -> tuple[Tensor, Tensor | None]:
    """One block's K and V rows with its norm's weight and bias folded in, in the model's dtype."""
    linear, norm = block.qkv, block.attention_norm
    if not isinstance(linear, FullLinear):
        raise TypeError(f"Block {block.index}'s qkv is {linear.format}; only full precision can be folded.")
    first = block.spec.query_size
    weight = linear.weight[first:].float()
    bias = linear.bias[first:].float() if linear.bias is not None else None
    if norm.bias is not None:
        shift = weight @ norm.bias.float()
        bias = shift if bias is None else bias + shift
    dtype = linear.weight.dtype
    return (weight * norm.weight.float()).to(dtype), bias.to(dtype) if bias is not None else None
