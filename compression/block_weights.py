"""From tensors under canonical names to the parts of a decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.block import Block, BlockFrame
from exeunt.compression.checkpoint_names import block_shapes, linear_names, linear_shapes, shared_shapes
from exeunt.compression.embedding import Embedding
from exeunt.compression.linear import FullLinear, Int4Linear, Linear
from exeunt.compression.norm import Norm
from exeunt.compression.weights import StackedTensors, WeightError
from exeunt.kernels.int4_linear import Int4Weight


class _Reader:
    """Looks tensors up by canonical name, checks their shapes and moves them where the decoder is."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        dtype: torch.dtype,
        prefix: str,
    ) -> None:
        self._tensors, self._shapes = tensors, shapes
        self._device, self._dtype, self._prefix = device, dtype, prefix

    def __call__(self, name: str) -> Tensor:
        """A tensor in the decoder's dtype: always a copy, so that a file that changes later harms nothing."""
        if not isinstance(self._tensors, StackedTensors) or name not in self._tensors:
            return self.raw(name, self._shapes[name]).to(self._device, self._dtype, copy=True)
        copy = torch.empty(self._shapes[name], device=self._device, dtype=self._dtype)
        filled = 0
        for part in self._tensors.parts(name):
            copy[filled : filled + len(part)] = part
            filled += len(part)
        return copy

    def optional(self, name: str) -> Tensor | None:
        return self(name) if name in self._shapes else None

    def raw(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        try:
            tensor = self._tensors[name]
        except KeyError:
            raise WeightError(f"Tensor '{self._prefix}{name}' is missing from the model's files.") from None
        if shape is not None and tuple(tensor.shape) != shape:
            raise WeightError(
                f"Tensor '{self._prefix}{name}' is {list(tensor.shape)}; the config asks for {list(shape)}."
            )
        return tensor

    def copied(self, name: str) -> Tensor:
        """A tensor as it is stored, copied to the device."""
        tensor = self.raw(name)
        return tensor.to(self._device, copy=True)

    def norm(self, name: str, spec: Architecture) -> Norm:
        return Norm(spec.norm, self(f"{name}.weight"), self.optional(f"{name}.bias"), spec.norm_eps)


def read_embedding(
    spec: Architecture, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Embedding:
    """The embeddings and the final norm; raises WeightError for a missing or misshapen tensor."""
    read = _Reader(tensors, shared_shapes(spec), device, dtype, "")
    return Embedding(
        read("embedding.tokens"), read.optional("embedding.positions"), read.norm("final_norm", spec)
    )


def read_output(
    spec: Architecture,
    tensors: Mapping[str, Tensor],
    embedding: Embedding,
    device: torch.device,
    dtype: torch.dtype,
    *,
    int4_group_size: int | None = None,
    twin: Linear | None = None,
) -> Linear:
    """The output matrix: INT4 where a group size is given and the tensors hold it so.

    Else it is that of `twin` where there is one, or the embedding's own tensor where the model ties them. A tied
    embedding stays in full precision beside an INT4 output matrix: a look-up reads one row of it per token. Raises
    WeightError.
    """
    if int4_group_size is not None and "output.codes" in tensors:
        return read_int4_output(spec, tensors, device, int4_group_size)
    if twin is not None:
        return twin
    if spec.tied:
        return FullLinear(embedding.tokens)
    return FullLinear(_Reader(tensors, shared_shapes(spec), device, dtype, "")("output.weight"))


def read_int4_output(
    spec: Architecture, tensors: Mapping[str, Tensor], device: torch.device, group_size: int
) -> Linear:
    """The output matrix in INT4; raises WeightError where the tensors do not hold it so."""
    read = _Reader(tensors, {}, device, torch.float16, "")
    return Int4Linear(_int4(read, "output", (spec.vocab_size, spec.hidden_size), group_size))


def read_block(
    spec: Architecture,
    index: int,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    int4_group_size: int | None = None,
    frame: BlockFrame | None = None,
) -> Block:
    """Block `index`, INT4 where a group size is given; norms and biases are those of `frame` where there is one.

    Raises WeightError for a missing or misshapen tensor.
    """
    frame = frame or read_frame(spec, index, tensors, device, dtype)
    read = _Reader(tensors, block_shapes(spec), device, dtype, f"blocks.{index}.")
    linears: dict[str, Linear] = {}
    for name, bias in frame.biases.items():
        if int4_group_size is None:
            linears[name] = FullLinear(read(f"{name}.weight"), bias)
        else:
            linears[name] = Int4Linear(_int4(read, name, linear_shapes(spec)[name], int4_group_size), bias)
    return frame.block(linears)


def read_frame(
    spec: Architecture, index: int, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> BlockFrame:
    """Block `index` without its matrices, which are not read. Raises WeightError for a missing or misshapen tensor."""
    read = _Reader(tensors, block_shapes(spec), device, dtype, f"blocks.{index}.")
    return BlockFrame(
        spec,
        index,
        read.norm("attention_norm", spec),
        read.norm("mlp_norm", spec),
        _head_norm(read, spec),
        {name: read.optional(f"{name}.bias") for name in linear_names(spec)},
    )


def _int4(read: _Reader, name: str, shape: tuple[int, int], group_size: int) -> Int4Weight:
    try:
        return Int4Weight(
            codes=read.copied(f"{name}.codes"),
            scales=read.copied(f"{name}.scales"),
            offsets=read.copied(f"{name}.offsets"),
            group_size=group_size,
            in_features=shape[1],
            out_features=shape[0],
        )
    except WeightError:
        raise
    except ValueError as error:
        raise WeightError(f"{name}: {error}") from error


def _head_norm(read: _Reader, spec: Architecture) -> Tensor | None:
    """[heads + kv_heads, head_dim]: the query norm's weight for every query head, then the key norm's."""
    if not spec.qk_norm:
        return None
    query, key = read("query_norm.weight"), read("key_norm.weight")
    return torch.cat([query.expand(spec.heads, -1), key.expand(spec.kv_heads, -1)]).contiguous()
