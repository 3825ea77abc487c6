"""One transformer block over paged keys and values, one operation at a time.

On a CPU the native kernel of `exeunt.kernels.blocks` does the same for many blocks in one call (see
`exeunt.compression.native_blocks`); this is its reference, and what runs everywhere else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint_names import linear_names
from exeunt.compression.linear import Linear
from exeunt.compression.norm import Norm, rms_norm
from exeunt.compression.rope import rotate
from exeunt.kernels.paged_attention import paged_attention
from exeunt.kernels.paged_batch import KVBlock, PagedBatch
from exeunt.kernels.write_kv import write_kv

Rotation = (
    tuple[Tensor, Tensor] | None
)  # cosines and signed sines [tokens, 1, head_dim]; None: learned positions

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Block:
    """Attention and MLP of one block. Its linears may be full-precision or INT4, each by itself.

    Pre-norm, as all supported families: h += out(attention(norm(h))), h += down(act(gate(norm(h))) × up(norm(h))).
    """

    __slots__ = (
        "_activation",
        "_kv_rows",
        "attention_norm",
        "down",
        "head_norm",
        "index",
        "mlp_norm",
        "out",
        "qkv",
        "scale",
        "spec",
        "up",
        "window",
    )

    def __init__(
        self,
        spec: Architecture,
        index: int,
        attention_norm: Norm,
        mlp_norm: Norm,
        head_norm: Tensor | None,
        linears: Mapping[str, Linear],
    ) -> None:
        """`head_norm` [heads + kv_heads, head_dim] weighs queries, then keys (Qwen3); `linears` by canonical name."""
        self.spec = spec
        self.index = index
        self.attention_norm = attention_norm
        self.mlp_norm = mlp_norm
        self.head_norm = head_norm
        self._activation = _ACTIVATIONS[spec.activation]
        self.scale = spec.attention_scales[index]
        self.window = spec.windows[index]
        self._kv_rows: Linear | None = None  # the key and value rows of qkv, once they are asked for
        self.qkv, self.out, self.up, self.down = (linears[name] for name in linear_names(spec))

    def linears(self) -> dict[str, Linear]:
        """The block's linears by canonical name, in the order in which a token passes them."""
        return dict(zip(linear_names(self.spec), (self.qkv, self.out, self.up, self.down), strict=True))

    def with_linears(self, linears: Mapping[str, Linear]) -> "Block":
        """The same block with some linears replaced."""
        return Block(
            self.spec,
            self.index,
            self.attention_norm,
            self.mlp_norm,
            self.head_norm,
            {**self.linears(), **linears},
        )

    @property
    def frame(self) -> "BlockFrame":
        """The block without its matrices; the tensors are this block's own."""
        biases = {name: linear.bias for name, linear in self.linears().items()}
        return BlockFrame(self.spec, self.index, self.attention_norm, self.mlp_norm, self.head_norm, biases)

    def run(self, hidden: Tensor, rotation: Rotation, batch: PagedBatch, kv: KVBlock) -> Tensor:
        """The block applied to `hidden` [tokens, hidden] in place; writes its keys and values, then attends."""
        queries, keys, values = self.attention_inputs(hidden, rotation)
        write_kv(keys, values, batch.slots, kv)
        return self.add_attended(hidden, paged_attention(queries, kv, batch, self.scale, self.window))

    def attention_inputs(self, hidden: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim] of `hidden`."""
        spec = self.spec
        tokens = hidden.shape[0]
        qkv = self.qkv(self.attention_norm(hidden)).view(
            tokens, spec.heads + 2 * spec.kv_heads, spec.head_dim
        )
        turning = qkv[:, : spec.heads + spec.kv_heads]
        if self.head_norm is not None:
            turning = rms_norm(turning, self.head_norm, spec.norm_eps)
        if rotation is not None:
            turning = rotate(turning, *rotation)
        return turning[:, : spec.heads], turning[:, spec.heads :], qkv[:, spec.heads + spec.kv_heads :]

    def add_attended(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The block's state, in `hidden` in place, once what it `attended` to [tokens, heads, head_dim] is known."""
        self.out.add_to(hidden, attended.reshape(hidden.shape[0], self.spec.query_size))
        return self.down.add_to(hidden, self._inner(self.mlp_norm(hidden)))

    @property
    def kv_rows(self) -> Linear:
        """The part of the QKV product that gives keys and values."""
        if self._kv_rows is None:
            spec = self.spec
            self._kv_rows = self.qkv.rows(spec.query_size, spec.query_size + 2 * spec.kv_size)
        return self._kv_rows

    def project_kv(self, hidden: Tensor, rotation: Rotation, slots: Tensor, kv: KVBlock) -> None:
        """Write this block's keys and values of `hidden` [tokens, hidden] to `slots`, without attending."""
        spec = self.spec
        heads = self.kv_rows(self.attention_norm(hidden)).view(
            hidden.shape[0], 2, spec.kv_heads, spec.head_dim
        )
        keys = heads[:, 0]
        if self.head_norm is not None:
            keys = rms_norm(keys, self.head_norm[spec.heads :], spec.norm_eps)
        if rotation is not None:
            keys = rotate(keys, *rotation)
        write_kv(keys, heads[:, 1], slots, kv)

    def _inner(self, normed: Tensor) -> Tensor:
        up = self.up(normed)
        if not self.spec.gated:
            return self._activation(up)
        width = self.spec.intermediate_size
        return self._activation(up[:, :width]).mul_(up[:, width:])

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: "full" and "int4" linears, "norms" and biases."""
        sizes = {"full": 0, "int4": 0, "norms": self.frame.nbytes}
        for linear in self.linears().values():
            sizes[linear.format] += linear.nbytes
        return sizes


@dataclass(frozen=True, slots=True)
class BlockFrame:
    """A block without its matrices: norms and biases, a few kilobytes that all decoders of one model share.

    `biases` are by the canonical names of the linears, None where a layer has none.
    """

    spec: Architecture
    index: int
    attention_norm: Norm
    mlp_norm: Norm
    head_norm: Tensor | None  # see `Block`
    biases: Mapping[str, Tensor | None]

    def block(self, linears: Mapping[str, Linear]) -> Block:
        """The block with these linears, by canonical name; each is to hold its own of `biases`."""
        return Block(self.spec, self.index, self.attention_norm, self.mlp_norm, self.head_norm, linears)

    @property
    def nbytes(self) -> int:
        """Bytes of norms and biases."""
        rest = [self.head_norm, *self.biases.values()]
        norms = self.attention_norm.nbytes + self.mlp_norm.nbytes
        return norms + sum(tensor.nbytes for tensor in rest if tensor is not None)
